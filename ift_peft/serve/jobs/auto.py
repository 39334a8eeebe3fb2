"""What "auto" means, in one place.

- `n_epochs`: 3, more for few rows and fewer for very many, so that 100 to 25,000 rows are seen; at most 25. The rule
  of OpenAI's cookbook (Data preparation and analysis for chat model fine-tuning).
- `batch_size`: one row for each 32, at most 16, so that an epoch of a small set still takes some steps.
- `learning_rate_multiplier`: 1. The learning rate is this times that of the base: 1.2e-3 for `tiny`, whose adapter is
  small beside its embeddings, 2e-4 (Dettmers et al. 2023, arXiv:2305.14314, for 7 to 13 B) for all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ift_peft.serve.objects import Hyperparameters

TARGET_EPOCHS, MOST_EPOCHS = 3, 25
FEWEST_SEEN, MOST_SEEN = 100, 25_000
ROWS_OF_A_BATCH_ROW, MOST_BATCH = 32, 16


@dataclass(frozen=True)
class Defaults:
    """Where the multiplier 1 stands for a base, and what its adapter is."""

    learning_rate: float
    adapter: dict[str, Any]


def defaults_of(model: str) -> Defaults:
    """Of what a recipe calls `base.model`."""
    adapter = {"method": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    if model == "tiny":
        return Defaults(1.2e-3, {**adapter, "embeddings": True})
    return Defaults(2e-4, adapter)


def resolve(given: Hyperparameters, rows: int) -> Hyperparameters:
    """`given` with a number for each "auto", for `rows` rows to train on."""
    return Hyperparameters(
        n_epochs=_epochs(rows) if given.n_epochs == "auto" else given.n_epochs,
        batch_size=max(1, min(MOST_BATCH, rows // ROWS_OF_A_BATCH_ROW))
        if given.batch_size == "auto"
        else given.batch_size,
        learning_rate_multiplier=1.0 if given.learning_rate_multiplier == "auto" else given.learning_rate_multiplier,
    )


def _epochs(rows: int) -> int:
    rows = max(1, rows)
    if rows * TARGET_EPOCHS < FEWEST_SEEN:
        return min(MOST_EPOCHS, FEWEST_SEEN // rows)
    if rows * TARGET_EPOCHS > MOST_SEEN:
        return max(1, MOST_SEEN // rows)
    return TARGET_EPOCHS
