"""Rendered rows as padded batches, those of like length together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ift_peft.data.render import IGNORE, Rendered
from ift_peft.errors import ModelError

Progress = Callable[[int, int], None]  # rows done, rows in all
OnBatch = Callable[[Sequence[int]], None]  # the numbers of the rows of a batch that is about to be run


def pad(rendered: Sequence[Rendered], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, int64 of shape (rows, longest), padded on the right."""
    longest = max(len(row.input_ids) for row in rendered)
    shape = (len(rendered), longest)
    batch = {
        "input_ids": torch.full(shape, pad_token_id, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORE, dtype=torch.long),
    }
    for index, row in enumerate(rendered):
        length = len(row.input_ids)
        batch["input_ids"][index, :length] = torch.tensor(row.input_ids)
        batch["attention_mask"][index, :length] = 1
        batch["labels"][index, :length] = torch.tensor(row.labels)
    return batch


def by_length(rendered: Sequence[Rendered], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of like length, longest first, so that memory runs out at once if at all."""
    order = sorted(range(len(rendered)), key=lambda i: -len(rendered[i].input_ids))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def require_finite(finite: bool) -> None:
    """Raises `ModelError` where logits were not."""
    if not finite:
        raise ModelError(
            expected="finite likelihoods",
            found="NaN or infinity in the logits",
            fix="use base.compute_dtype=float32, or bfloat16 on a GPU that has it",
        )
