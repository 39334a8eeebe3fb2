"""What a run is foreseen to need, told before its weights are loaded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ift_peft.data.render import IGNORE
from ift_peft.errors import ModelError
from ift_peft.model.base import choose_device, choose_dtype
from ift_peft.model.memory import Batch, foresee, free_bytes
from ift_peft.recipe import Recipe
from ift_peft.reporter import Reporter
from ift_peft.sections import Quantization
from ift_peft.train.arguments import sft_config
from ift_peft.train.prepare import Prepared


def largest_batch(prepared: Prepared, rows: int) -> Batch:
    """The longest rows together, as the sampler makes them its first batch."""
    longest = np.argsort(prepared.lengths)[-rows:]
    supervised = 0
    for row in longest:
        labels = prepared.train.dataset[int(row)]["labels"]
        supervised += sum(label != IGNORE for label in labels)
    length = int(prepared.lengths[longest].max())
    return Batch(rows=len(longest), length=length, positions=max(1, min(length, supervised)))


def foresee_memory(recipe: Recipe, prepared: Prepared, reporter: Reporter) -> dict[str, Any]:
    """The entry `memory` of the manifest, and notes of what is needed and what is free.

    A teacher, and divergences from the base, are not counted, and said not to be.
    """
    device = choose_device(recipe.base.device)
    dtype = choose_dtype(recipe.base.compute_dtype, device)
    arguments = sft_config(
        recipe.training, output_dir=Path(), device=device, compute_dtype=dtype, max_length=prepared.max_length
    )
    unpacked = device.type == "cpu" and recipe.base.quantization in ("nf4", "fp4")
    packed: Quantization = "none" if unpacked else recipe.base.quantization
    try:
        needed = foresee(
            prepared.location,
            recipe.adapter,
            largest_batch(prepared, arguments.per_device_train_batch_size),
            dtype=dtype,
            quantization=packed,
            double_quantization=recipe.base.double_quantization,
            checkpointing=bool(arguments.gradient_checkpointing),
            head=recipe.base.head,
        )
    except ModelError as error:
        reporter.note(f"memory was not foreseen: {error.found}")
        return {}
    free = free_bytes(device)
    beside = " beside a teacher or base to stay close to" if recipe.loss.teacher or recipe.loss.kl_to_base else ""
    told = f"about {_gb(needed.total)} are needed for training{beside}, {_gb(free)} are free"
    if needed.total > free:
        told = f"warning: {told}; lower training.per_device_train_batch_size or training.max_length"
    reporter.note(told)
    return {"foreseen": asdict(needed), "foreseen_bytes": needed.total, "free_before_bytes": free}


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"
