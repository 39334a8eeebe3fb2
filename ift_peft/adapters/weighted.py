"""Several LoRA adapters on one base made into one: what each method says, and the adapter that comes nearest to it.

The arithmetic is PEFT's (`peft.utils.merge_utils`), on what each adapter adds to a weight, its delta B A. PEFT's own
`add_weighted_adapter` combines A and B apart in `linear`, `ties`, `dare_linear`, `dare_ties` and `magnitude_prune`,
which is another thing than their names say (docs/combine.md); its forms `cat` and `…_svd` are those below.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper, merge_utils
from torch import Tensor

from ift_peft.model.initialise import whole_in_float32
from ift_peft.model.quiet import quiet
from ift_peft.stages import Method

RANDOM: tuple[Method, ...] = ("dare_linear", "dare_ties")
Arithmetic = Callable[[list[Tensor], Tensor, float], Tensor]
_ARITHMETIC: dict[Method, Arithmetic] = {
    "linear": lambda deltas, weights, density: merge_utils.task_arithmetic(deltas, weights),
    "svd": lambda deltas, weights, density: merge_utils.task_arithmetic(deltas, weights),
    "ties": merge_utils.ties,
    "dare_linear": merge_utils.dare_linear,
    "dare_ties": merge_utils.dare_ties,
    "magnitude_prune": merge_utils.magnitude_prune,
}


@dataclass(frozen=True)
class Combination:
    """How adapters are combined. `density` is the share of each delta that is kept; None: all of it.

    `rank` is that of the result; None: the sum of the adapters' ranks, of `svd` the largest of them. `seed` is that of
    what DARE drops.
    """

    method: Method
    weights: tuple[float, ...]
    density: float | None = None
    rank: int | None = None
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "weights": list(self.weights)}


def own_weights(method: Method, number: int) -> tuple[float, ...]:
    """The weights where none are given: a mean of the deltas. TIES takes a mean by itself (arXiv:2306.01708)."""
    return (1.0 if method in ("ties", "dare_ties") else 1 / number,) * number


@torch.no_grad()
def add_combined(model: Any, parents: Sequence[str], how: Combination, *, name: str) -> float:
    """Give a PEFT model the adapter `name`, combined of its adapters `parents`; that becomes the active one.

    Modules trained whole, as a classifier's head, are combined by their difference from the base. Returns the share
    (0 to 1) of the combined deltas' squared size that the rank of the result leaves out; 0 of `linear`.
    """
    layers = {at: layer for at, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    first = model.peft_config[parents[0]]
    ranks = [max(_factors(layer, parent)[0].shape[1] for layer in _with(parent, layers)) for parent in parents]
    rank = how.rank or (max(ranks) if how.method == "svd" else sum(ranks))
    if how.method == "linear":
        rank = sum(ranks)
    with quiet():
        model.add_adapter(name, _config(model, first, layers, parents, rank))
    whole_in_float32(model, name)
    model.set_adapter(name, inference_mode=True)
    lost = whole = 0.0
    with seeded(how.seed):
        for layer in layers.values():
            of = [number for number, parent in enumerate(parents) if _has(layer, parent)]
            if of and _has(layer, name):
                own = replace(how, weights=tuple(how.weights[number] for number in of))
                left, right, kept, all_of = _combined([_factors(layer, parents[number]) for number in of], own, rank)
                _fill(layer, name, left, right)
                lost, whole = lost + max(0.0, all_of - kept), whole + all_of
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                _combine_whole(module, parents, how, name)
    return lost / whole if whole else 0.0


def _config(model: Any, first: LoraConfig, layers: dict[str, LoraLayer], parents: Sequence[str], rank: int) -> Any:
    """That of the first adapter, for a delta that is taken as it is: PEFT divides by r or, of rsLoRA, by its root."""
    wanted = [model.peft_config[parent].target_modules for parent in parents]
    modules: Any = wanted[0]
    if any(one != modules for one in wanted):
        prefix = "base_model.model."
        modules = [
            at.removeprefix(prefix) for at, layer in layers.items() if any(_has(layer, parent) for parent in parents)
        ]
    return replace(
        first,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        lora_dropout=0.0,
        target_modules=modules,
        modules_to_save=list(first.modules_to_save) if first.modules_to_save else None,
    )


def _combined(factors: list[tuple[Tensor, Tensor]], how: Combination, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """B and A of the combined delta, its squared size within `rank`, and in all."""
    if how.method in ("linear", "svd"):
        left = torch.cat([b for b, _ in factors], dim=1)
        right = torch.cat([weight * a for weight, (_, a) in zip(how.weights, factors, strict=True)], dim=0)
        if how.method == "linear":
            return left, right, 1.0, 1.0
        # the singular values of B A are those of a product as small as their rank
        q_left, r_left = torch.linalg.qr(left)
        q_right, r_right = torch.linalg.qr(right.T)
        u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        u, v = q_left @ u, v @ q_right.T
    else:
        wanted = said(how, [b @ a for b, a in factors])
        u, s, v = torch.linalg.svd(wanted, full_matrices=False)
    squares = s.double().square()
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank], float(squares[:rank].sum()), float(squares.sum())


def said(how: Combination, deltas: list[Tensor]) -> Tensor:
    """What the method makes of the deltas of one weight, all of one shape."""
    weights = torch.tensor(how.weights, dtype=deltas[0].dtype, device=deltas[0].device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density 1")  # nothing is pruned, as asked
        return _ARITHMETIC[how.method](deltas, weights, 1.0 if how.density is None else how.density)


def _combine_whole(wrapper: Any, parents: Sequence[str], how: Combination, name: str) -> None:
    of = [number for number, parent in enumerate(parents) if parent in wrapper.modules_to_save]
    if not of or name not in wrapper.modules_to_save:
        return
    own = replace(how, weights=tuple(how.weights[number] for number in of))
    theirs = [dict(wrapper.modules_to_save[parents[number]].named_parameters()) for number in of]
    base = dict(wrapper.original_module.named_parameters())
    for key, parameter in wrapper.modules_to_save[name].named_parameters():
        start = base[key].to(parameter.dtype)
        parameter.data = start + said(own, [one[key].data - start for one in theirs])


def _with(adapter: str, layers: dict[str, LoraLayer]) -> Iterator[LoraLayer]:
    return (layer for layer in layers.values() if _has(layer, adapter))


def _has(layer: Any, adapter: str) -> bool:
    return adapter in layer.lora_A or adapter in layer.lora_embedding_A


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """B of shape (out, r) and A of shape (r, in), scaled, in float32; of an embedding, `in` is the vocabulary."""
    if adapter in layer.lora_A:
        b, a = layer.lora_B[adapter].weight.data, layer.lora_A[adapter].weight.data
    else:
        b, a = layer.lora_embedding_B[adapter].data, layer.lora_embedding_A[adapter].data
    return b.float(), a.float() * layer.scaling[adapter]


def _fill(layer: Any, adapter: str, left: Tensor, right: Tensor) -> None:
    """Set B and A, with zeros up to the adapter's rank, which a weight with a short side does not have."""
    if adapter in layer.lora_A:
        b, a = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    else:
        b, a = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    b.data.zero_()
    a.data.zero_()
    b.data[:, : left.shape[1]] = left
    a.data[: right.shape[0]] = right


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw by `seed`, and leave the random numbers of everything else as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
