"""What a classifier's head says of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ift_peft.data.render import IGNORE, Rendered
from ift_peft.infer.batches import OnBatch, Progress, by_length, pad, require_finite


def class_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (rows, classes) of a padded batch, and the number of each row's class."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"]
    return logits, labels[labels != IGNORE]


@torch.no_grad()
def all_class_logits(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    pad_token_id: int,
    progress: Progress | None = None,
    on_batch: OnBatch | None = None,
) -> Tensor:
    """Float32 logits (prompts, classes) on CPU, in the order of the prompts. Raises `ModelError` for NaN or infinity.

    `progress` counts labels, as it does where each label is a text of its own; `on_batch` is called with the numbers of
    the prompts of each batch before it is run.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    rows = [Rendered(ids, [IGNORE] * (len(ids) - 1) + [0]) for ids in prompts]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    done = 0
    for indices in by_length(rows, batch_size):
        if on_batch is not None:
            on_batch(indices)
        batch = {name: part.to(device) for name, part in pad([rows[i] for i in indices], pad_token_id).items()}
        logits = class_logits(model, batch)[0].float().cpu()
        for index, row in zip(indices, logits, strict=True):
            found[index] = row
        done += logits.numel()
        if progress is not None:
            progress(done, len(rows) * logits.shape[-1])
    model.train(was_training)
    together = torch.stack(found)
    require_finite(bool(torch.isfinite(together).all()))
    return together
