"""Models while they are loaded: opened once however many ask at once, held while asked, the idle ones put out."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections import Counter, OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ift_peft.errors import BusyError, Faults, ModelError
from ift_peft.serve.errors import ApiError, as_api_error, not_found
from ift_peft.serve.inference.failures import Failures
from ift_peft.serve.inference.models import Named, find
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Store

if TYPE_CHECKING:  # it imports torch, which a service has no need of before the first request
    from ift_peft.serve.inference.hosts import Host, Model, Opened

log = logging.getLogger("ift_peft.serve")
FRESH_SECONDS = 1.0  # for which one is kept for those who waited for it


class LoadedModels:
    """The models in memory. `hold` is for the event loop, everything else for any thread."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="loading")
        self.tokenising = ThreadPoolExecutor(2, thread_name_prefix="tokenising")  # long prompts wait for each other
        self._failures = Failures()
        self._one_whole = threading.Lock()
        self._lock = threading.Lock()  # of the following
        self._models: OrderedDict[str, Model] = OrderedDict()  # the last used at the end
        self._holds: Counter[str] = Counter()
        self._hosts: dict[tuple[str, str], Future[Host]] = {}
        self._loads: Counter[tuple[str, str]] = Counter()  # of models that are being loaded onto a host
        self._forgotten: set[str] = set()
        self._opening: dict[str, asyncio.Future[None]] = {}  # of the event loop alone
        self._whole_hosts = self._asking = 0

    async def hold(self, name: str) -> Model:
        """The model, loaded, and not put out before `release`.

        Raises `ApiError`: 404 for no model, 429 where too many wait for one to load or all slots are in use, 503 for
        one that cannot be loaded.
        """
        if self._asking >= self._settings.limits.waiting_requests:
            raise as_api_error(
                BusyError(expected="fewer requests that wait for a model to load", found=str(self._asking), fix="wait")
            )
        self._asking += 1
        try:
            loop = asyncio.get_running_loop()
            named = await asyncio.to_thread(find, name, self._settings, self._store)
            while True:
                model = self._hold(name)
                if model is not None:
                    return model
                if name not in self._opening:
                    opening = loop.run_in_executor(self._threads, self._load, named)
                    self._opening[name] = opening
                    opening.add_done_callback(lambda done: self._opened(name, done))
                try:
                    await asyncio.shield(self._opening[name])
                except ApiError as error:
                    raise error.again() from None
        finally:
            self._asking -= 1

    def release(self, name: str) -> None:
        with self._lock:
            self._holds[name] -= 1
            if self._holds[name] <= 0:
                del self._holds[name]

    def forget(self, name: str) -> None:
        """Put a model out for good; what is being answered by it is answered to its end."""
        with self._lock:
            self._forgotten.add(name)
            model = self._models.pop(name, None)
        if model is not None:
            self._put_out(model)

    def rows(self) -> tuple[int, int]:
        """Rows that are being answered, and requests that wait for one."""
        hosts = self.hosts()
        return sum(host.engine.running for host in hosts), sum(host.engine.waiting for host in hosts)

    def hosts(self) -> list[Host]:
        """Every base in memory: of its own, or shared."""
        with self._lock:
            shared = [one.result() for one in self._hosts.values() if one.done() and one.exception() is None]
            own = [model.host for model in self._models.values()]
        return list(dict.fromkeys([*shared, *own]))

    def stop(self) -> None:
        """End the engines; what they have is cancelled. Who let requests end before has nothing cancelled."""
        for threads in (self._threads, self.tokenising):
            threads.shutdown(wait=False, cancel_futures=True)
        for host in self.hosts():
            host.engine.stop(drain=False)

    def _hold(self, name: str) -> Model | None:
        with self._lock:
            model = self._models.get(name)
            if model is not None:
                self._models.move_to_end(name)
                self._holds[name] += 1
            return model

    def _opened(self, name: str, done: asyncio.Future[None]) -> None:
        self._opening.pop(name, None)
        if not done.cancelled():
            done.exception()  # asked for here, as all who waited may be gone

    def _load(self, named: Named) -> None:
        """Load a model and keep it for those who wait. In a thread of its own."""
        self._failures.check(named.name)
        with ExitStack() as until_kept:
            self._keep(named, until_kept)

    def _keep(self, named: Named, until_kept: ExitStack) -> None:
        name = named.name
        try:
            model = self._loaded(named, until_kept)
        except ApiError:
            raise
        except Exception as error:
            raise self._failures.told(name, error) from None
        with self._lock:
            forgotten = name in self._forgotten
            if not forgotten:
                self._models[name] = model
                self._holds[name] += 1
                self._failures.forget(name)
        if forgotten:
            self._put_out(model)
            raise not_found("model", name, param="model", code="model_not_found")
        timer = threading.Timer(FRESH_SECONDS, self.release, (name,))
        timer.daemon = True
        timer.start()

    def _loaded(self, named: Named, until_kept: ExitStack) -> Model:
        from ift_peft.serve.inference import hosts

        if named.record is None:
            opened = hosts.open_base(self._settings, named.name)
            return hosts.Model(self._shared(opened, named.name, until_kept), None, opened, opened.system_fingerprint())
        folder = self._settings.data_dir
        opened = hosts.open_tuned(self._settings, folder / named.record["run"], folder / named.record["adapter"])
        fingerprint = opened.system_fingerprint()  # first, as it may fail where files are gone
        if self._settings.engine == "vllm":
            host = self._shared(opened, named.record["base"], until_kept)
            hosts.give_to_vllm(host, opened, named.name, folder / "cache" / "vllm" / named.record["id"])
            return hosts.Model(host, named.name, opened.over(host), fingerprint)
        reason = hosts.stackable(opened)
        if reason is None:
            host = self._shared(opened, named.record["base"], until_kept)
            try:
                host.take(named.name, Path(folder / named.record["adapter"]), lambda: self._make_room(host))
                return hosts.Model(host, named.name, opened.over(host), fingerprint)
            except (ModelError, Faults) as error:
                reason = error.found
        log.info("a model takes a base of its own: %s", reason, extra={"model": named.name})
        with self._one_whole:
            host = self._whole(opened)
        return hosts.Model(host, None, opened.over(host), fingerprint)

    def _shared(self, opened: Opened, base: str, until_kept: ExitStack) -> Host:
        """The base in memory, loaded by whoever asks first. It stays there until `until_kept` ends."""
        from ift_peft.serve.inference.hosts import host_of_shared

        key = opened.key
        future, mine = self._place(key)
        until_kept.callback(self._loaded_onto, key)
        if mine:
            try:
                future.set_result(host_of_shared(opened, base, self._settings))
            except BaseException as error:
                with self._lock:
                    del self._hosts[key]
                future.set_exception(error)
        return future.result()

    def _place(self, key: tuple[str, str]) -> tuple[Future[Host], bool]:
        """The base of this key, to come or there, and whether it is the caller's to load."""
        from ift_peft.serve.inference.hosts import SLOT_SECONDS

        most, until = self._settings.limits.bases, time.monotonic() + SLOT_SECONDS
        while True:
            with self._lock:
                future = self._hosts.get(key)
                mine = future is None and len(self._hosts) < most
                if mine:
                    future = self._hosts[key] = Future()
                if future is not None:
                    self._loads[key] += 1
                    return future, mine
            if not self._end_idlest():
                if time.monotonic() > until:
                    raise BusyError(expected=f"fewer than {most} bases in use", found=str(most), fix="wait")
                time.sleep(0.02)

    def _loaded_onto(self, key: tuple[str, str]) -> None:
        with self._lock:
            self._loads[key] -= 1
            future = self._hosts.get(key)
        if future is not None and future.done():
            self._end_unused(future.result())

    def _end_unused(self, host: Host) -> None:
        """End a shared base that no model is left of, nor one being loaded; a thread waits for what it has."""
        with self._lock:
            key = self._key(host)
            if key is None or self._loads[key] or any(model.host is host for model in self._models.values()):
                return
            del self._hosts[key]
        threading.Thread(target=_end, args=([host],), name="ending", daemon=True).start()

    def _end_idlest(self) -> bool:
        """Put out the shared base that was idle the longest, with its models. False where all are in use."""
        ending, gone = self._take_idlest()
        if not ending:
            return False
        while gone:
            self._put_out(gone.pop())
        _end(ending)  # before the next one comes: both may be more than there is memory for
        return True

    def _take_idlest(self) -> tuple[list[Host], list[Model]]:
        with self._lock:
            used = {model.host for name, model in self._models.items() if self._holds[name]}
            for model in self._models.values():
                host, key = model.host, self._key(model.host)
                working = host in used or host.engine.running or host.engine.waiting
                if key is not None and not working and not self._loads[key] and self._last_of(host) is model:
                    names = [name for name, one in self._models.items() if one.host is host]
                    del self._hosts[key]
                    return [host], [self._models.pop(name) for name in names]
        return [], []

    def _last_of(self, host: Host) -> Model:
        return next(model for model in reversed(self._models.values()) if model.host is host)

    def _key(self, host: Host) -> tuple[str, str] | None:
        """Of a base that is shared. For who holds the lock."""
        of_it = (key for key, one in self._hosts.items() if one.done() and not one.exception() and one.result() is host)
        return next(of_it, None)

    def _whole(self, opened: Opened) -> Host:
        from ift_peft.serve.inference.hosts import SLOT_SECONDS, host_of_whole

        most = self._settings.limits.whole_models
        until = time.monotonic() + SLOT_SECONDS
        while self._whole_hosts >= most and not self._make_room(None):
            if time.monotonic() > until:
                expected = f"fewer than {most} models in use that need a base of their own"
                raise BusyError(expected=expected, found=str(most), fix="wait")
            time.sleep(0.02)
        host = host_of_whole(opened, self._settings.limits)
        with self._lock:
            self._whole_hosts += 1
        return host

    def _make_room(self, host: Host | None) -> bool:
        """Put out the model of `host`, or of those with a base of their own, that was idle the longest."""
        with self._lock:
            for name, model in self._models.items():
                one_of = model.host.whole if host is None else model.host is host and model.adapter is not None
                if one_of and not self._holds[name]:
                    del self._models[name]
                    break
            else:
                return False
        self._put_out(model)
        return True

    def _put_out(self, model: Model) -> None:
        """A stacked adapter's rows keep it; an engine of its own ends what it has, which a thread waits for."""
        if model.host.whole:
            with self._lock:
                self._whole_hosts -= 1
            threading.Thread(target=_end, args=([model.host],), name="ending", daemon=True).start()
            return
        if model.adapter is not None:
            model.host.drop(model.adapter)
        self._end_unused(model.host)


def _end(ending: list[Host]) -> None:
    """Let an engine end what it has, and its base leave memory: so it is taken from what it is given in."""
    ending.pop().engine.stop()
    gc.collect()
