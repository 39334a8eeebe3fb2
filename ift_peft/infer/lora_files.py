"""LoRA weights out of the folders that PEFT writes, without building a `PeftModel`."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ift_peft.errors import IftPeftError, ModelError, first_line, raise_all
from ift_peft.infer.adapter_files import try_patterns

PREFIX = "base_model.model."
BASES_OWN = ".base_layer.weight"  # of embeddings, which PEFT saves beside their adapters
KEY = re.compile(r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
MERGE = "merge it into its base and serve that (ift merge), or train it as plain LoRA"
# What of a LoraConfig the weights' shapes and names say already, or what does not change the outputs.
READ_ELSEWHERE = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "peft_type",
        "peft_version",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Lora:
    """Of one module: `a` (r, in) and `b` (r, out), float32, with the scaling in `b`."""

    a: Tensor
    b: Tensor


def require_plain(folder: Path) -> None:
    """Raise what of `read_lora`'s faults the configuration alone shows, before a base is loaded."""
    raise_all(_faults_of(_config(folder), folder))


def read_lora(folder: Path, model: nn.Module) -> dict[str, Lora]:
    """The weights in an adapter folder by the names of `model`'s modules.

    Raises `ModelError` or `Faults` for what is not plain LoRA on linear layers and embeddings, and for modules that
    `model` does not have or has in another shape.
    """
    config = _config(folder)
    faults = _faults_of(config, folder)
    raise_all(faults)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelError(
            expected=f"adapter_model.safetensors in {folder}", found=first_line(error), fix="save the adapter again"
        ) from error
    modules = dict(model.named_modules())
    own = {key: tensors.pop(key) for key in list(tensors) if key.endswith(BASES_OWN)}
    pairs, faults = _pairs(tensors, folder)
    faults += _faults_of_base(own, modules, folder)
    for name, pair in pairs.items():
        fault = _fault_of_module(name, pair, modules.get(name), folder)
        if fault is not None:
            faults.append(fault)
    raise_all(faults)
    try_patterns(model, folder)
    return {
        name: Lora(pair["A"].float(), pair["B"].float().T * (_scaling(config, name, len(pair["A"]))))
        for name, pair in pairs.items()
    }


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            expected=f"adapter_config.json in {folder}", found=first_line(error), fix="give the folder of an adapter"
        ) from error
    return dict(config)


def _faults_of(config: dict[str, Any], folder: Path) -> list[IftPeftError]:
    """Everything in an adapter's configuration that outputs depend on and stacked matrices cannot do."""
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        return [ModelError(expected="a LoRA adapter", found=f"peft_type {kind!r} in {folder}", fix=MERGE)]
    usual = LoraConfig().to_dict()
    found = [
        f"{name}={value!r}"
        for name, value in sorted(config.items())
        if name not in READ_ELSEWHERE and value and value != usual.get(name)
    ]
    started = config.get("init_lora_weights")
    if isinstance(started, str) and started.startswith(CHANGES_THE_BASE):
        found.append(f"init_lora_weights={started!r}, which changes the base's own weights")
    return [ModelError(expected="plain LoRA", found=f"{one} in {folder}", fix=MERGE) for one in found]


def _faults_of_base(own: dict[str, Tensor], modules: dict[str, nn.Module], folder: Path) -> list[IftPeftError]:
    """The base's weights that lie beside the adapter and are not those of this base."""
    faults: list[IftPeftError] = []
    for key, saved in own.items():
        name = key.removeprefix(PREFIX).removesuffix(BASES_OWN)
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or not torch.equal(saved.to(weight.device, weight.dtype), weight):
            faults.append(
                ModelError(expected=f"the base's own weights of {name}", found=f"others in {folder}", fix=MERGE)
            )
    return faults


def _pairs(tensors: dict[str, Tensor], folder: Path) -> tuple[dict[str, dict[str, Tensor]], list[IftPeftError]]:
    """A (r, in) and B (out, r) of each module, and the tensors that are neither."""
    pairs: dict[str, dict[str, Tensor]] = {}
    faults: list[IftPeftError] = []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            faults.append(ModelError(expected="LoRA matrices alone", found=f"{key} in {folder}", fix=MERGE))
            continue
        name = match["module"].removeprefix(PREFIX)
        pairs.setdefault(name, {})[match["linear"] or match["embedding"]] = tensor
    faults += [
        ModelError(expected="A and B of each module", found=f"one of {name} in {folder}", fix="save the adapter again")
        for name, pair in pairs.items()
        if len(pair) != 2
    ]
    if not tensors:
        faults.append(ModelError(expected="LoRA matrices", found=f"none in {folder}", fix="save the adapter again"))
    return pairs, faults


def shape_of(module: nn.Module | None) -> tuple[int, int] | None:
    """Width in and out of a linear layer, or vocabulary and width of an embedding; None of anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None


def _fault_of_module(name: str, pair: dict[str, Tensor], module: nn.Module | None, folder: Path) -> IftPeftError | None:
    if len(pair) != 2:
        return None
    shape = shape_of(module)
    if shape is None:
        found = "no module of that name" if module is None else type(module).__name__
        return ModelError(
            expected=f"{name} in the base, a linear layer or an embedding, for {folder}",
            found=found,
            fix="load the adapter on the base it was trained on" if module is None else MERGE,
        )
    own = (pair["A"].shape[1], pair["B"].shape[0])
    if own != shape or pair["A"].shape[0] != pair["B"].shape[1]:
        return ModelError(
            expected=f"{shape[0]} to {shape[1]} features for {name}",
            found=f"A {tuple(pair['A'].shape)} and B {tuple(pair['B'].shape)} in {folder}",
            fix="load the adapter on the base it was trained on",
        )
    if not (torch.isfinite(pair["A"]).all() and torch.isfinite(pair["B"]).all()):
        return ModelError(expected="finite weights", found=f"NaN or infinity in {name} of {folder}", fix="train again")
    return None


def _scaling(config: dict[str, Any], name: str, r: int) -> float:
    """As PEFT scales: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), name), config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(r) if config.get("use_rslora") else r)
