"""Each weight of a merged model against the adapter as it runs: logits do not show a small adapter's lost layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ift_peft.errors import MergeError

_PROBES = 4  # random vectors: of a change of any rank, one at least shows
_ROWS = 4096  # of a weight, at a time
_PREFIX = "base_model.model."
# Relative rounding of one number of a type, at most.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
_DORA = 32 * 2.0**-24


@dataclass(frozen=True)
class Probed:
    """One weight: its product with random vectors, float64 of shape (rows, probes), and its Frobenius norm."""

    product: Tensor
    norm: float
    computed: float = 0.0
    """What of it, relatively, float32 may lose on the way: DoRA divides by norms that are sums over a whole side."""


@torch.no_grad()
def probe_weights(model: Any) -> dict[str, Probed]:
    """Every parameter by its name in the base; of a PEFT model, with the adapter in it.

    An adapted linear module or embedding is asked by its own forward in float64, one at a time, so that nothing of
    what merges weights is trusted; experts, by what PEFT adds to them in theirs. Other adapted modules are left out.
    """
    found: dict[str, Probed] = {}
    left_out: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            delta = sum(module.get_delta_weight(one).double() for one in module.active_adapters)
            found[f"{bare_name(path)}.{module.parameter_name}"] = _of_tensor(module.get_param().double() + delta)
        elif isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            if isinstance(base, nn.Linear | Conv1D | nn.Embedding):
                weight, bias = _of_layer(module)
                found[f"{bare_name(path)}.weight"] = weight
                if bias is not None:
                    found[f"{bare_name(path)}.bias"] = bias
            else:
                left_out |= {f"{bare_name(path)}.{name}" for name, _ in base.named_parameters()}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        name = bare_name(path)
        if name not in found and name not in left_out and not _of_adapter(path):
            found[name] = _of_tensor(parameter)
    return found


def check_weights(expected: Mapping[str, Probed], found: Mapping[str, Probed], *, dtype: str, what: str) -> int:
    """The number of weights checked. Raises `MergeError` where one is missing, or further off than its type rounds.

    A rounding error is at most `ROUNDING` times each number of a weight, and its product with a normal vector of about
    that share of the weight's norm.
    """
    names = sorted(expected.keys() & found.keys())
    missing = sorted(expected.keys() - found.keys())
    off = {}
    for name in names:
        difference = float((expected[name].product - found[name].product).norm()) / _PROBES**0.5
        limit = (3 * ROUNDING[dtype] + expected[name].computed) * expected[name].norm + 1e-12
        if not difference <= limit:
            off[name] = (difference / limit, difference, limit)
    if not missing and not off:
        return len(names)
    worst = max(off, key=lambda name: off[name][0], default=None)
    told = f"no {missing[0]}" if worst is None else f"a difference of {off[worst][1]:.3g} in {worst}"
    explained = "" if worst is None else f", where rounding explains {off[worst][2]:.2g}"
    raise MergeError(
        expected=f"every weight of {what} to be the base's with the adapter in it",
        found=f"{told}{explained}; {len(missing) + len(off)} of {len(expected)} weights are others",
        fix="nothing was written; this is a fault of merging: please report it",
    )


def bare_name(path: str) -> str:
    """The name that a module or parameter inside a PEFT model has in the base."""
    name = path.removeprefix(_PREFIX).replace(".modules_to_save.default", "")
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def _of_adapter(path: str) -> bool:
    """Whether a parameter is the adapter's own, or stands aside for a module that was trained whole."""
    if ".modules_to_save.default." in path:
        return False
    return ".original_module." in path or "default" in path.split(".")


def _of_layer(layer: Any) -> tuple[Probed, Probed | None]:
    """Weight and bias of an adapted linear module or embedding, by its forward.

    The bias is what it makes of nothing: (IA)3 scales outputs, and the base's own bias with them.
    """
    alone = copy.deepcopy(layer).double().eval()
    base = alone.get_base_layer()
    weight, directions = base.weight, _directions(base.weight.shape[1]).to(base.weight.device)
    computed = _DORA if any(getattr(layer, "use_dora", {}).values()) else 0.0
    norm = float(weight.norm())
    if isinstance(base, nn.Embedding):
        scale = float(getattr(base, "scalar_embed_scale", 1.0))  # Gemma's embeddings are scaled
        product = torch.cat([alone(rows) / scale @ directions for rows in _numbers(weight).split(_ROWS)])
        return Probed(product.cpu(), norm, computed), None
    inputs = weight.shape[1] if isinstance(base, nn.Linear) else weight.shape[0]
    offset = alone(torch.zeros(1, inputs, dtype=torch.float64, device=weight.device))
    bias = replace(_of_tensor(offset[0]), computed=computed) if base.bias is not None or offset.any() else None
    if isinstance(base, nn.Linear):
        product = (alone(directions.T) - offset).T
    else:  # Conv1D: a weight is stored as its inputs by its outputs
        parts = (nn.functional.one_hot(rows, inputs).double() for rows in _numbers(weight).split(_ROWS))
        product = torch.cat([(alone(part) - offset) @ directions for part in parts])
    return Probed(product.cpu(), norm, computed), bias


def _numbers(weight: Tensor) -> Tensor:
    return torch.arange(weight.shape[0], device=weight.device)


def _of_tensor(tensor: Tensor) -> Probed:
    """Of any other: a vector is its own product, and a stack of matrices one below the other."""
    norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    if tensor.dim() < 2:
        return Probed(tensor.double().reshape(-1, 1).repeat(1, _PROBES).cpu(), norm)
    directions = _directions(tensor.shape[-1]).to(tensor.device)
    parts = tensor.reshape(-1, tensor.shape[-1]).split(_ROWS)
    return Probed(torch.cat([part.double() @ directions for part in parts]).cpu(), norm)


def _directions(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, _PROBES, dtype=torch.float64, generator=generator)
