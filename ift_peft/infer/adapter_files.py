"""The files of an adapter, looked at before PEFT reads them: it unpickles, imports and leaves out what they say."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from ift_peft.errors import IftPeftError, ModelError, first_line, raise_all
from ift_peft.model.base import quiet
from ift_peft.plain_files import read_text
from ift_peft.sections import Adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METHODS = ("LORA", "ADALORA", "IA3", "VERA")
NEVER_OURS = ("megatron_config", "auto_mapping", "layer_replication")  # PEFT imports what the first two name
_PLAIN = re.compile(r"[\w.^-]+")  # a name, or the end of one
MOST_RANKS = 100_000
FIX = "train again; an adapter from elsewhere is no part of this run"
OTHER_BASE = "load the adapter on the base it was trained on, or train again"


def adapter_faults(folder: Path, section: Adapter) -> Iterator[IftPeftError]:
    """What is wrong with an adapter by its files and the recipe's `section`; nothing where there are none."""
    if (folder / CONFIG).is_file():
        faults = list(_config_faults(folder / CONFIG, section))
        yield from faults
        if not faults:
            yield from _unread(folder)
    if (folder / WEIGHTS).is_file():
        yield from _weight_faults(folder / WEIGHTS)
    elif pickled := sorted(path.name for path in folder.glob("*.bin")):
        yield ModelError(
            expected=f"{WEIGHTS} in {folder}",
            found=f"only a pickled one ({', '.join(pickled)}), which can run code",
            fix=FIX,
        )


def _config_faults(file: Path, section: Adapter) -> Iterator[IftPeftError]:
    try:
        config = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        yield ModelError(expected=f"an adapter's configuration in {file}", found=first_line(error), fix=FIX)
        return
    if not isinstance(config, dict):
        yield ModelError(expected=f"an object in {file}", found=type(config).__name__, fix=FIX)
        return
    if config.get("peft_type") not in METHODS:
        yield ModelError(
            expected=f"peft_type out of {', '.join(METHODS)}",
            found=f"{config.get('peft_type')!r:.80} in {file}",
            fix=FIX,
        )
    for pattern in _patterns(config):
        if pattern not in _patterns(section.model_dump()) and not _PLAIN.fullmatch(pattern):
            yield ModelError(  # how long it takes, nobody can tell
                expected="patterns of modules as in the recipe", found=f"{pattern!r:.200} in {file}", fix=FIX
            )
    for name in NEVER_OURS:
        if config.get(name):
            yield ModelError(
                expected=f"no {name}, which training never sets", found=f"{config[name]!r:.200} in {file}", fix=FIX
            )
    if not _is_rank(config.get("r", 1)):
        yield ModelError(expected=f"a rank of 1 to {MOST_RANKS:,}", found=f"{config['r']!r:.80} in {file}", fix=FIX)


def _unread(folder: Path) -> Iterator[IftPeftError]:
    """The fault of a configuration that PEFT does not take."""
    try:
        with quiet(), told_as_ours(folder):
            PeftConfig.from_pretrained(str(folder))
    except ModelError as error:
        yield error


def _patterns(settings: dict[str, Any]) -> list[str]:
    """What PEFT would match against names of modules as a regular expression."""
    single = [settings.get(name) for name in ("target_modules", "exclude_modules", "layers_pattern")]
    several = [settings.get(name) for name in ("rank_pattern", "alpha_pattern")]
    return [
        *(one for one in single if isinstance(one, str)),
        *(key for one in several if isinstance(one, dict) for key in one),
    ]


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_RANKS


def _weight_faults(file: Path) -> Iterator[IftPeftError]:
    """A file that is no safetensors, and tensors that hold what is no number."""
    try:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - no mapping
                tensor = opened.get_tensor(key)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    yield ModelError(expected="finite weights", found=f"NaN or infinity in {key} of {file}", fix=FIX)
                    return
    except (OSError, SafetensorError, RuntimeError) as error:
        yield ModelError(expected=f"weights in safetensors in {file}", found=first_line(error), fix=FIX)


def load_adapter(base: Any, folder: Path, section: Adapter) -> PeftModel:
    """The base with the adapter in `folder` on it. Raises `ModelError` or `Faults` for what PEFT cannot load whole.

    PEFT draws a tensor that is missing at random, and passes over one that has no place.
    """
    raise_all(list(adapter_faults(folder, section)))
    with told_as_ours(folder):
        model = PeftModel.from_pretrained(base, folder)
    check_loaded(model, folder, "default")
    return model


def add_adapter(model: PeftModel, folder: Path, name: str, section: Adapter) -> None:
    """Put one more adapter on a model, as `load_adapter`."""
    raise_all(list(adapter_faults(folder, section)))
    with told_as_ours(folder):
        model.load_adapter(str(folder), name)
    check_loaded(model, folder, name)


def check_loaded(model: PeftModel, folder: Path, name: str) -> None:
    """Raises `ModelError` where the file lacks a tensor of the adapter `name`, or holds one that has no place."""
    embeddings = _embeddings(model)
    wanted = {
        key
        for key in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        if _is_adapters(key, embeddings)
    }
    with safe_open(folder / WEIGHTS, "pt") as opened:
        held = {key for key in opened.keys() if _is_adapters(key, embeddings)}  # noqa: SIM118
    faults: list[IftPeftError] = []
    for expected, keys in (("a tensor for {}", wanted - held), ("no tensor without a place, as {}", held - wanted)):
        if keys:
            found = f"{len(keys)} {'missing' if keys <= wanted else 'of them'} in {folder / WEIGHTS}"
            faults.append(ModelError(expected=expected.format(sorted(keys)[0]), found=found, fix=OTHER_BASE))
    raise_all(faults)


def _embeddings(model: PeftModel) -> tuple[str, ...]:
    """Names of the modules whose own weights PEFT may save beside an adapter."""
    own = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if any(module is one for one in own)}
    return tuple(sorted(names - {"base_layer"}))


def _is_adapters(key: str, embeddings: tuple[str, ...]) -> bool:
    """Whether a tensor is the adapter's own, and not the base's that lie beside it."""
    ending = key.removesuffix(".base_layer.weight").removesuffix(".weight").rpartition(".")[2]
    return not key.endswith(".base_layer.weight") and ending not in embeddings


@contextmanager
def told_as_ours(folder: Path) -> Iterator[None]:
    """PEFT's errors, of many kinds, as a `ModelError`: what it cannot load is the adapter's fault, not a crash."""
    try:
        with warnings.catch_warnings():  # what is missing is looked for by `check_loaded`, and is no mere warning
            warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
            yield
    except (IftPeftError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(
            expected=f"an adapter of this base in {folder}", found=_short(error), fix=OTHER_BASE
        ) from error


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"
