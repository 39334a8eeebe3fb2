"""The files of an adapter, looked at before PEFT reads them: it unpickles, imports and leaves out what they say."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from ift_peft.errors import IftPeftError, ModelError, first_line, raise_all
from ift_peft.model.quiet import quiet
from ift_peft.plain_files import read_text
from ift_peft.run_dir import ADAPTER_FILES
from ift_peft.trial import SECONDS, TakesMore, tried

CONFIG, WEIGHTS = ADAPTER_FILES
METHODS = ("LORA", "ADALORA", "IA3", "VERA")
NEVER_OURS = (  # PEFT imports what the first two name
    *("megatron_config", "auto_mapping", "layer_replication", "exclude_modules", "layers_pattern"),
    *("layers_to_transform", "alora_invocation_tokens", "trainable_token_indices"),
)
_PLAIN = re.compile(r"(?:\.\*\\\.)?[\w.^-]+")  # a name, or the end of one, as PEFT itself writes it for fused experts
_ANY_OF = re.compile(r"\(\.\*\[\.\]\)\?\((?:[\w.|-]|\\[.-])+\)")  # as training writes feedforward_modules
_BY_RANK = re.compile(r"lora_(embedding_)?[AE]\b|vera_lambda_d\b")  # tensors whose first side is the rank
USUAL_RANKS = 1024  # whatever the weights hold: that they do not fit is told by their sizes
MOST_ALPHA = 1e9
FIX = "train again; an adapter from elsewhere is no part of this run"
OTHER_BASE = "load the adapter on the base it was trained on, or train again"


def adapter_faults(folder: Path) -> Iterator[IftPeftError]:
    """What is wrong with an adapter by its files; nothing where there are none."""
    if (folder / CONFIG).is_file():
        faults = list(_config_faults(folder / CONFIG))
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


def _config_faults(file: Path) -> Iterator[IftPeftError]:
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
    for name in ("modules_to_save", "target_parameters"):  # PEFT itself writes the latter for fused experts
        named = config.get(name) or []
        if not isinstance(named, list) or not all(isinstance(one, str) and _PLAIN.fullmatch(one) for one in named):
            yield ModelError(expected=f"{name} to be a list of names", found=f"{named!r:.200} in {file}", fix=FIX)
    for name in NEVER_OURS:
        if config.get(name):
            yield ModelError(
                expected=f"no {name}, which training never sets", found=f"{config[name]!r:.200} in {file}", fix=FIX
            )
    yield from _number_faults(config, file)


def _number_faults(config: dict[str, Any], file: Path) -> Iterator[IftPeftError]:
    """Ranks that no memory holds, and scales that make no number of any weight."""
    ranks, alphas = _values(config, "rank_pattern"), _values(config, "alpha_pattern")
    if ranks is None or alphas is None:
        yield ModelError(expected="mappings as rank_pattern and alpha_pattern", found=f"others in {file}", fix=FIX)
        return
    ranks += [config[name] for name in ("r", "init_r", "target_r") if name in config]
    alphas += [config["lora_alpha"]] if "lora_alpha" in config else []
    most = max(USUAL_RANKS, _ranks_of(file.with_name(WEIGHTS)))
    for wrong in [one for one in ranks if not _is_rank(one, most)][:1]:
        yield ModelError(expected=f"a rank of 1 to {most:,}", found=f"{wrong!r:.80} in {file}", fix=FIX)
    for wrong in [one for one in alphas if not _is_alpha(one)][:1]:
        yield ModelError(expected=f"lora_alpha of at most {MOST_ALPHA:.0e}", found=f"{wrong!r:.80} in {file}", fix=FIX)


def _values(config: dict[str, Any], name: str) -> list[Any] | None:
    """The numbers of modules, without AdaLoRA's lists of which ranks are left; None of what is no mapping."""
    found = config.get(name) or {}
    return [one for one in found.values() if not isinstance(one, list)] if isinstance(found, dict) else None


def _unread(folder: Path) -> Iterator[IftPeftError]:
    """The fault of a configuration that PEFT does not take."""
    try:
        with quiet(), told_as_ours(folder):
            PeftConfig.from_pretrained(str(folder))
    except ModelError as error:
        yield error


def _patterns(settings: dict[str, Any]) -> list[str]:
    """What PEFT would match against names of modules as a regular expression."""
    single = [settings.get(name) for name in ("target_modules", "feedforward_modules")]
    several = [settings.get(name) for name in ("rank_pattern", "alpha_pattern")]
    return [
        *(one for one in single if isinstance(one, str)),
        *(key for one in several if isinstance(one, dict) for key in one),
    ]


def _plain(pattern: str) -> bool:
    """Whether a pattern is matched at once: a name, or one of several."""
    return bool(_PLAIN.fullmatch(pattern) or _ANY_OF.fullmatch(pattern))


def try_patterns(model: nn.Module, folder: Path) -> None:
    """Raises `ModelError` where PEFT would match the patterns of the adapter in `folder` against modules for too long.

    A run's recipe comes with the adapter: that the pattern stands in both says nothing about it.
    """
    patterns = [one for one in _patterns(json.loads(read_text(folder / CONFIG))) if not _plain(one)]
    if not patterns:
        return
    names = tuple(name for name, _ in model.named_modules())
    try:
        tried("ift_peft.infer.pattern_trial", {"patterns": patterns, "names": names})
    except TakesMore:
        raise ModelError(
            expected=f"patterns of modules that are matched in {SECONDS} s",
            found=f"{patterns!r:.200} in {folder / CONFIG}",
            fix=FIX,
        ) from None


def _is_alpha(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= MOST_ALPHA  # of NaN, which JSON of Python's may hold, neither is true


def _is_rank(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _ranks_of(weights: Path) -> int:
    """The most that a tensor has: PEFT makes room for those of a configuration before it looks at the weights."""
    with suppress(OSError, SafetensorError, RuntimeError), safe_open(weights, "pt") as opened:
        by_rank = [key for key in opened.keys() if _BY_RANK.search(key)]  # noqa: SIM118 - no mapping
        return max((opened.get_slice(key).get_shape()[0] for key in by_rank), default=0)
    return 0


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


def load_adapter(base: Any, folder: Path) -> PeftModel:
    """The base with the adapter in `folder` on it. Raises `ModelError` or `Faults` for what PEFT cannot load whole.

    `adapter_faults` has been asked before. PEFT draws a tensor that is missing at random, and passes over one that has
    no place.
    """
    try_patterns(base, folder)
    with told_as_ours(folder):
        model = PeftModel.from_pretrained(base, folder)
    check_loaded(model, folder, "default")
    return model


def add_adapter(model: PeftModel, folder: Path, name: str) -> None:
    """Put one more adapter on a model, as `load_adapter`."""
    try_patterns(model, folder)
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
