"""One attempt at a job: its trainer started, followed and stopped, and what it left made the job's outcome."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import select

from ift_peft.errors import DiskFull, is_full
from ift_peft.serve.files.records import forget_deleted
from ift_peft.serve.jobs.endings import UNTOLD, error_of, untold
from ift_peft.serve.jobs.folder import JobFolder
from ift_peft.serve.jobs.progress import Progress
from ift_peft.serve.jobs.queue import Stopping
from ift_peft.serve.jobs.records import ACTIVE, change, fail, tell
from ift_peft.serve.jobs.results import clear_cancelled, succeed
from ift_peft.serve.objects import FINAL
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Record, Store, StoreUnavailable
from ift_peft.serve.store.tables import jobs
from ift_peft.yaml_source import laid_over

log = logging.getLogger("ift_peft.serve")
FOLLOW_SECONDS = 0.3
GRACE_SECONDS = 30.0  # from SIGTERM, after which a trainer writes a checkpoint and ends, to SIGKILL
MOST_DEATHS = 3  # of trainers, one after another and without a further step between
STOPPED = (130, -signal.SIGTERM)
PATIENCE_SECONDS = 2.0  # between two tries at a store that is locked, full or away

T = TypeVar("T")


class Attempt:
    """The attempt `number` at `job`. It ends where the job ends, is paused, or is queued for another attempt."""

    def __init__(self, settings: Settings, store: Store, stopping: threading.Event, job: str, number: int) -> None:
        self.settings, self.store, self.stopping = settings, store, stopping
        self.job, self.number = job, number
        self.folder = JobFolder(settings.jobs / job)
        self._reached = True  # the store, at the last look

    def run(self) -> None:
        """Raises `Stopping` where the service stops before the attempt has ended."""
        try:
            self._run()
        except Exception as error:
            if self._patiently(self._record) is None:  # it was withdrawn, and its files are gone
                self._patiently(self._leave)
                return
            if is_full(error):
                self._fail(error_of(*UNTOLD[DiskFull.exit_code]))
                return
            log.exception("an attempt at a job broke off", extra={"job": self.job})
            self._fail(error_of("internal_error", f"{type(error).__name__} in the service"))

    def _patiently(self, call: Callable[[], T]) -> T:
        """What `call` gives once the store can be reached: an attempt that gave up would leave its job without an end.

        Raises `Stopping` where the service stops before that.
        """
        while True:
            try:
                return call()
            except StoreUnavailable as error:
                log.warning("a job waits for the store", extra={"job": self.job, "code": error.code})
                if self.stopping.wait(PATIENCE_SECONDS):
                    raise Stopping from None

    def _run(self) -> None:
        deaths, steps = 0, 0
        self._patiently(self._begin)
        while record := self._patiently(self._record):
            folder = self.folder.handed(self._task(record))
            progress = self._patiently(lambda: Progress(self.settings, self.store, record, folder))  # noqa: B023
            code = self._train(progress)
            if code == 0 and self._patiently(lambda: self._succeed(progress)):  # noqa: B023
                return
            if self.stopping.is_set():
                raise Stopping
            if self._patiently(self._record) is None:
                break
            if code > 0 and code not in STOPPED:
                self._fail(folder.error() or untold(code))
                return
            deaths, steps = (1 if progress.steps > steps else deaths + 1), max(steps, progress.steps)
            if deaths >= MOST_DEATHS:
                self._fail(error_of("trainer_died", f"the trainer was killed {deaths} times"))
                return
            self._patiently(self._tell_started_again)
        self._patiently(self._leave)

    def _begin(self) -> None:
        with self.store.begin() as connection:
            is_new = select(jobs.c.id).where(jobs.c.id == self.job, jobs.c.checked_at.is_(None))
            if connection.execute(is_new).first() is not None:
                change(connection, self.job, to="validating_files", of=("queued",), attempt=self.number)

    def _tell_started_again(self) -> None:
        with self.store.begin() as connection:
            tell(connection, self.job, "The trainer was stopped from outside; it is started again", level="warn")

    def _leave(self) -> None:
        """What is to be removed of a job that was withdrawn can be, now that its trainer writes no more."""
        ended = self.store.one(select(jobs.c.status).where(jobs.c.id == self.job))
        if ended is not None and ended["status"] in FINAL:
            clear_cancelled(self.settings, self.job)
        forget_deleted(self.settings, self.store, self.job)

    def _record(self) -> Record | None:
        """The job, as long as this attempt is to go on with it."""
        is_ours = (jobs.c.id == self.job, jobs.c.status.in_(ACTIVE), jobs.c.attempt == self.number)
        return self.store.one(select(jobs).where(*is_ours))

    def _task(self, record: Record) -> dict[str, Any]:
        held = {"train": str(self.folder.training)}
        if record["validation_file"] is not None:
            held["test"] = str(self.folder.validation)
        return {
            "recipe": laid_over(record["recipe"], {"data": held}),
            "base": record["base"],
            "runs": str(self.settings.runs),
            "devices": str(self.settings.data_dir / "devices"),
            "checked": record["checked_at"] is not None,
        }

    def _train(self, progress: Progress) -> int:
        """Start the trainer and follow it to its end; its exit code."""
        command = [sys.executable, "-m", "ift_peft.serve.jobs.trainer", str(self.folder.path), str(os.getpid())]
        with self.folder.log.open("ab") as output:
            trainer = subprocess.Popen(
                command,
                cwd=self.settings.data_dir,
                env={**os.environ, "IFT_PEFT_CACHE": str(self.folder.cache)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            return self._follow(trainer, progress)
        finally:
            if trainer.poll() is None:
                os.killpg(trainer.pid, signal.SIGKILL)
                trainer.wait()

    def _follow(self, trainer: subprocess.Popen[bytes], progress: Progress) -> int:
        """Its exit code. A service that stops asks the store no more before it ends the trainer, and tells the last of
        it only to a store that was there at the last look."""
        killed_at: float | None = None
        while True:
            try:
                code = trainer.wait(FOLLOW_SECONDS)
            except subprocess.TimeoutExpired:
                wanted = not self.stopping.is_set() and self._is_wanted(progress)
            else:
                if self._reached or not self.stopping.is_set():
                    self._patiently(progress.update)
                return code
            if killed_at is None and not wanted:
                trainer.terminate()
                killed_at = time.monotonic() + GRACE_SECONDS
            elif killed_at is not None and time.monotonic() > killed_at:
                os.killpg(trainer.pid, signal.SIGKILL)

    def _is_wanted(self, progress: Progress) -> bool:
        """Tell how far the trainer is; whether its job goes on. A trainer does not wait for a store that is away."""
        try:
            progress.update()
            self._reached = True
            return self._record() is not None
        except StoreUnavailable as error:
            self._reached = False
            log.warning("a job's progress cannot be told", extra={"job": self.job, "code": error.code})
            return True

    def _succeed(self, progress: Progress) -> bool:
        succeeded = succeed(self.settings, self.store, progress)
        if succeeded:
            self.folder.clear()
        return succeeded

    def _fail(self, error: dict[str, str | None]) -> None:
        code, message, param = str(error["code"]), str(error["message"]), error["param"]
        if self._patiently(lambda: fail(self.store, self.job, self.number, code=code, message=message, param=param)):
            log.warning("a job failed", extra={"job": self.job, "code": code})
        self.folder.clear(keep_log=code in ("internal_error", "trainer_died", "hung"))


def withdraw(store: Store, job: str, *, to_cancelled: bool) -> bool:
    """Cancel or pause `job`; its trainer, if any, sees it and stops. Whether its status was one that this changes."""
    with store.begin() as connection:
        if to_cancelled:
            changed = change(connection, job, to="cancelled", of=(*ACTIVE, "paused"))
        else:
            changed = change(connection, job, to="paused", estimated_finish=None)
        if changed:
            tell(connection, job, "The job was cancelled" if to_cancelled else "The job was paused")
        return changed
