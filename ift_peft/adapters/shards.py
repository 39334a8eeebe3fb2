"""A plan carried out: one weight after the other is read, merged by PEFT's own layer, and written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ift_peft.adapters.checkpoint import Read, reading, write_shards
from ift_peft.adapters.plan import ADAPTER_FILE, Plan, Weight
from ift_peft.errors import MergeError


def write_merged(
    plan: Plan,
    folder: Path,
    *,
    base: Path,
    adapter: Path,
    max_shard_size: int | str,
    progress: Callable[[int, int], None],
) -> None:
    """Write the merged model to `folder` as float32: weights, index and configuration.

    No more is held than the shard being written, the base's shard being read (a file mapped into memory), and what
    PEFT needs to merge one weight: about four times that weight. Raises `MergeError` where one comes out infinite or
    as no number.
    """
    state = plan.model.get_base_model().state_dict()
    integers = {name: tensor.dtype for name, tensor in state.items() if not tensor.is_floating_point()}
    empty = {
        weight.key: torch.empty(weight.shape, dtype=integers.get(weight.name, torch.float32), device="meta")
        for weight in plan.weights
    }
    by_key = {weight.key: weight for weight in plan.weights}
    done = iter(range(1, len(by_key) + 1))

    with reading() as read:

        @torch.no_grad()
        def merged(key: str) -> Tensor:
            tensor = merged_weight(plan.model, by_key[key], adapter / ADAPTER_FILE, read=read)
            progress(next(done), len(by_key))
            return tensor

        write_shards(folder, empty, merged, max_shard_size=max_shard_size)
    config = plan.model.get_base_model().config
    config.architectures = [type(plan.model.get_base_model()).__name__]
    config.dtype = torch.float32
    if plan.untied:
        config.tie_word_embeddings = False
    config.save_pretrained(folder)
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")


def merged_weight(model: Any, weight: Weight, adapter: Path, *, read: Read) -> Tensor:
    """One weight of the merged model, in float32 as everything that is added up here."""
    if weight.replaced_by is not None:
        with reading() as read_adapter:
            return _float(read_adapter(adapter, weight.replaced_by))
    assert weight.stored is not None
    stored = _float(read(weight.stored.file, weight.stored.key))
    return (
        stored if weight.layer is None else merged_by_layer(model.get_submodule(weight.layer), weight, stored, adapter)
    )


def merged_by_layer(layer: Any, weight: Weight, stored: Tensor, adapter: Path) -> Tensor:
    """What PEFT's `layer` merges into the `stored` weight: LoRA, rsLoRA, DoRA, embeddings, each by PEFT's own code."""
    with reading() as read:
        tensors = {local: _float(read(adapter, key)) for local, key in weight.tensors.items()}
    try:
        layer.load_state_dict({"base_layer.weight": stored, **tensors}, strict=False, assign=True)
        layer.merge(safe_merge=True)
        result: Tensor = layer.get_base_layer().weight.data
    except ValueError as error:
        raise MergeError(
            expected=f"finite weights {weight.key}", found=str(error), fix="train again; nothing was written"
        ) from None
    finally:
        layer.merged_adapters.clear()
        layer.to("meta")
    return result


def _float(tensor: Tensor) -> Tensor:
    """A copy that outlives the mapped file it was read from, in float32 where it is not of integers."""
    return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()
