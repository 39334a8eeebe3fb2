"""What is not a number: which rows of a step make it so, and weights that have become it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ift_peft.data.render import IGNORE
from ift_peft.errors import NonFiniteLoss
from ift_peft.train.checkpoints import newest_verified
from ift_peft.train.out_of_memory import Batch, parts_of

_NAMED = 5  # rows in a message


def require_finite(model: Any, *, step: int, checkpoints: Path) -> None:
    """Raises `NonFiniteLoss` for trained weights that hold NaN or infinity, of which it names the first."""
    broken = non_finite(model)
    if broken:
        raise NonFiniteLoss(
            expected="finite adapter weights",
            found=f"NaN or infinity in {broken[0]} after step {step}",
            fix=f"lower training.learning_rate; {left_over(checkpoints)}",
        )


def non_finite(model: Any) -> list[str]:
    """Names of trainable parameters that hold NaN or infinity."""
    trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    if not trained:
        return []
    good = torch.stack([torch.isfinite(one).all() for _, one in trained]).tolist()
    return [name for (name, _), finite in zip(trained, good, strict=True) if not finite]


def left_over(checkpoints: Path) -> str:
    """What is left of a training that ended so."""
    newest, _ = newest_verified(checkpoints)
    return f"no adapter was written; {f'the last good checkpoint is {newest.name}' if newest else 'no checkpoint yet'}"


def not_finite(trainer: Any, model: Any, batches: Sequence[Batch], *, loss: float, norm: float) -> NonFiniteLoss:
    """The error of a step over `batches` whose loss or gradient is not finite; the weights are those before it.

    Every row is gone through once more by itself, forward and, where the loss is a number, backward.
    """
    rows = [row for batch in batches for row in parts_of(trainer._prepare_inputs(batch), 1)]
    bad = [row for row in rows if _is_bad(trainer, model, row)]
    step = trainer.state.global_step + 1
    if not bad:
        told, fix = f"in none of its {len(rows)} rows by itself, in their sum", "lower training.learning_rate"
    elif len(bad) == len(rows) > 1:
        told = f"in every one of its {len(rows)} rows"
        fix = "lower training.learning_rate: it is the weights rather than the rows"
        if trainer.state.global_step == 0:
            fix = "set base.compute_dtype=float32, or choose another base: nothing has been learnt yet"
    else:
        told = f"in {len(bad)} of its {len(rows)} rows by itself: {_named(trainer, bad)}"
        fix = "correct or remove what is named, or set base.compute_dtype=float32"
    return NonFiniteLoss(
        expected="a finite loss and gradient",
        found=f"loss {loss:.4g}, gradient norm {norm:.4g} at step {step}; {told}",
        fix=f"{fix}; {left_over(Path(trainer.args.output_dir))}",
    )


def _is_bad(trainer: Any, model: Any, row: Batch) -> bool:
    model.zero_grad()
    with trainer.compute_loss_context_manager():
        loss: Tensor = trainer.objective(model, row, bare=trainer.model).loss
    if not bool(torch.isfinite(loss)):
        return True
    loss.backward()
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    return any(not bool(torch.isfinite(gradient).all()) for gradient in gradients)


def _named(trainer: Any, rows: Sequence[Batch]) -> str:
    names = [name for row in rows[:_NAMED] for name in _names(trainer, row)]
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return ", ".join(dict.fromkeys(names)) + more


def _names(trainer: Any, row: Batch) -> list[str]:
    """Where a row stands: those of the data set with its ids and labels, most often one."""
    ids = row["input_ids"][0][row["attention_mask"][0].bool()].tolist()
    labels = row["labels"].reshape(-1).tolist()
    found = [trainer.where(at) for at in _renderings(trainer, ids, [one for one in labels if one != IGNORE])]
    return found or [f"one of {len(ids)} tokens"]


def _renderings(trainer: Any, ids: list[int], labels: list[int]) -> Iterator[int]:
    """Numbers of the renderings with these ids and supervised labels; only those of the same length are read."""
    for at in np.flatnonzero(np.asarray(trainer.lengths) == len(ids)).tolist():
        row = trainer.train_dataset[at]
        if list(row["input_ids"]) == ids and [one for one in row["labels"] if one != IGNORE] == labels:
            yield at
