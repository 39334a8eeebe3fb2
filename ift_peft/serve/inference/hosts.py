"""A base on the device and the engine that answers for it, with the adapters of many models or one model's own."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ift_peft.data.render import IGNORE, Renderer
from ift_peft.data.row import Message
from ift_peft.environment import versions
from ift_peft.errors import BusyError, Faults, ModelError
from ift_peft.infer.engine import Engine
from ift_peft.infer.load import Parts, load_model, open_parts
from ift_peft.infer.lora_files import require_plain
from ift_peft.infer.request import Request, Stream
from ift_peft.infer.stacked import StackedAdapters
from ift_peft.model.base import choose_device, choose_dtype, load_section
from ift_peft.model.tokenizer import BaseLocation, ensure_pad_token, load_tokenizer, locate_base
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.sections import Base
from ift_peft.serve.errors import ApiError
from ift_peft.serve.inference.tokens import TokenNames
from ift_peft.serve.inference.vllm import VllmAdapters, VllmEngine, VllmServer
from ift_peft.serve.settings import Limits, Settings

COLLAPSED = 4  # characters of which a tokenizer may make one before it looks for pieces, as of white space
SLOT_SECONDS = 5.0  # how long a model waits for a slot whose last rows are leaving it


class Answering(Protocol):
    """What answers requests: an engine of this process, or a server elsewhere."""

    positions: int | None

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    def submit(self, request: Request, *, on_change: Callable[[], None] | None = None) -> Stream: ...

    def stop(self, *, drain: bool = True) -> None: ...


@dataclass(frozen=True)
class Opened:
    """What a model's name stands for, before weights are loaded. `parts` is None for a base itself."""

    location: BaseLocation
    section: Base
    fingerprint: str
    parts: Parts | None = None
    adapter: Path | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Of the base in memory: models with the same one share it."""
        four_bits = self.section.quantization in ("nf4", "fp4")
        return self.section.model_dump_json(exclude=None if four_bits else {"double_quantization"}), self.fingerprint

    def over(self, host: Host) -> Opened:
        """With the host's tokenizer, which the run's was checked against: one in memory is enough."""
        return self if self.parts is None else replace(self, parts=replace(self.parts, renderer=host.renderer))

    def system_fingerprint(self) -> str:
        """Changes with the base, the adapter, or the software."""
        digest = hashlib.sha256(json.dumps([self.fingerprint, versions(), self.section.model_dump()]).encode())
        if self.adapter is not None:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                digest.update((self.adapter / name).read_bytes())
        return f"fp_{digest.hexdigest()[:12]}"


@dataclass(frozen=True)
class Model:
    """A model that is loaded: what answers for it, and how it is asked."""

    host: Host
    adapter: str | None
    opened: Opened
    system_fingerprint: str

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation's ids, with the system message of training where it brings none."""
        if self.opened.parts is not None:
            messages = self.opened.parts.converse(messages).messages
        return self.host.renderer.prompts([tuple(messages)])[0]

    def ids(self, text: str) -> list[int]:
        """Of a bare text, as the tokenizer begins one."""
        return list(self.host.renderer.tokenizer(text, verbose=False)["input_ids"])


class Host:
    """A renderer and what answers for it: for many models, or with `whole` for one alone.

    `most_characters` are more than a prompt can have that its positions hold; None where nothing limits them.
    """

    def __init__(
        self,
        renderer: Renderer,
        engine: Answering,
        stack: StackedAdapters | VllmAdapters | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self.renderer, self.engine, self.stack, self.whole = renderer, engine, stack, whole
        longest = max(map(len, renderer.tokenizer.get_vocab()))
        self.most_characters = None if engine.positions is None else engine.positions * longest * COLLAPSED
        self.names = TokenNames(renderer.tokenizer, frozenset({renderer.end_token_id}))
        (answer,) = renderer.render([({"role": "user", "content": "1"}, {"role": "assistant", "content": "1"})])
        learnt = [label for label in answer.labels if label != IGNORE]
        self.begins_with_space = str(renderer.tokenizer.decode(learnt)).startswith(" ")  # which is no part of answers

    def take(self, name: str, folder: Path, make_room: Callable[[], bool]) -> None:
        """Stack an adapter; where there is no slot, `make_room` removes an idle one and says whether there was any.

        One of this name that is still there is on its way out, and waited for. Raises `BusyError` where all slots
        stay in use, and what `StackedAdapters.load` raises.
        """
        assert isinstance(self.stack, StackedAdapters)
        until = time.monotonic() + SLOT_SECONDS
        while True:
            names = self.stack.names
            if name not in names and len(names) >= self.stack.max_adapters:
                make_room()
            try:
                if name in names:
                    raise BusyError(expected=f"{name!r} to have left", found="it is leaving", fix="try again later")
                return self.stack.load(name, folder)
            except BusyError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)

    def has(self, adapter: str) -> bool:
        return self.stack is None or adapter in self.stack.names

    def drop(self, adapter: str) -> None:
        """Take an adapter away, where it is there. Rows that use it keep it until they end."""
        if self.stack is not None and adapter in self.stack.names:
            self.stack.remove(adapter)


def open_base(settings: Settings, name: str) -> Opened:
    """A base of the settings, unquantised. Raises `ModelError` where it is not to be had."""
    section = _settled(Base(model=settings.bases[name]), settings)
    location = locate_base(section.model)
    return Opened(location, section, location.fingerprint())


def open_tuned(settings: Settings, run: Path, adapter: Path) -> Opened:
    """A run of the service. Raises what `open_parts` raises; `ApiError` (400) for one that does not generate."""
    found = RunDir(run)
    recipe = found.recipe()
    if recipe.base.head != "causal-lm":
        raise ApiError(400, "This model classifies and writes no text.", code="model_not_supported", param="model")
    recipe = recipe.model_copy(update={"base": _settled(recipe.base, settings)})
    parts = replace(open_parts(found), recipe=recipe)
    return Opened(parts.location, recipe.base, parts.location.fingerprint(), parts, adapter)


def _settled(section: Base, settings: Settings) -> Base:
    """On the service's device, and with nothing left to be chosen: equal sections are one base in memory."""
    device = choose_device(settings.device)
    dtype = str(choose_dtype(section.compute_dtype, device)).removeprefix("torch.")
    return section.model_copy(update={"device": device.type, "compute_dtype": dtype})


def stackable(opened: Opened) -> str | None:
    """Why an adapter's configuration does not let it share a base; None where it does."""
    assert opened.adapter is not None
    try:
        require_plain(opened.adapter)
    except (ModelError, Faults) as error:
        return error.found
    return None


def host_of_shared(opened: Opened, public_name: str, settings: Settings) -> Host:
    """A base for many models: of this process, or of the vLLM server. Raises `ModelError` where that has none."""
    if settings.engine == "vllm":
        return _host_of_vllm(opened, public_name, settings)
    return _host_of_base(opened, settings.limits)


def _host_of_base(opened: Opened, limits: Limits) -> Host:
    """The base loaded, with room for adapters, and an engine that runs."""
    loaded = load_section(opened.location, opened.section)
    stack = StackedAdapters(loaded.model, max_adapters=limits.adapters)
    return _running(loaded.model, renderer_of(opened.location), opened.section, limits, stack)


def host_of_whole(opened: Opened, limits: Limits) -> Host:
    """A base of its own for an adapter that cannot share one."""
    assert opened.parts is not None
    model, _ = load_model(opened.parts, adapter=opened.adapter)
    return _running(model, renderer_of(opened.location), opened.section, limits, None)


def renderer_of(location: BaseLocation) -> Renderer:
    """With a tokenizer that no other part uses. Raises `ModelError` where there is none."""
    tokenizer = load_tokenizer(location)
    ensure_pad_token(tokenizer)
    return Renderer(tokenizer)


def _running(model: object, renderer: Renderer, section: Base, limits: Limits, stack: StackedAdapters | None) -> Host:
    engine = Engine(
        model,
        renderer.tokenizer,
        end_token_ids={renderer.end_token_id},
        adapters=stack,
        max_rows=1 if section.quantization == "int8" else limits.rows_together,  # there rows change each other
        max_waiting=limits.waiting_requests,
    )
    engine.start()
    return Host(renderer, engine, stack, whole=stack is None)


def _host_of_vllm(opened: Opened, public_name: str, settings: Settings) -> Host:
    """A vLLM server that has the base. Raises `ModelError` where there is none, or none with this base."""
    server, renderer = VllmServer(settings.vllm_url), renderer_of(opened.location)
    served = server.models()
    names = (public_name, opened.section.model, opened.location.public_name)
    base = next((name for name in names if name in served), None)
    if base is None:
        raise ModelError(
            expected=f"vLLM to serve {' or '.join(dict.fromkeys(names))}",
            found=", ".join(served) or "nothing",
            fix=f"start it with --served-model-name {public_name}",
        )
    limits, positions = settings.limits, served[base].get("max_model_len")
    most = limits.rows_together + limits.waiting_requests
    engine = VllmEngine(server, base, positions=positions, end_token=renderer.end_token_id, most=most)
    return Host(renderer, engine, VllmAdapters(server))


def give_to_vllm(host: Host, opened: Opened, name: str, folder: Path) -> None:
    """Export the run's adapter to `folder`, where it is not yet, and have vLLM load it under `name`.

    Raises `ExportError` for what vLLM does not serve; `ApiError` (400) for a checkpoint, which is not exported.
    """
    from ift_peft.adapters.export.run import export

    assert isinstance(host.stack, VllmAdapters) and opened.parts is not None
    if opened.adapter != opened.parts.run.adapter:
        raise ApiError(400, "Checkpoints are not served through vLLM.", code="model_not_supported", param="model")
    if not (folder / "export.json").is_file():
        export(opened.parts, to="vllm", output=folder, reporter=Silent())
    host.stack.load(name, folder / "adapter")
