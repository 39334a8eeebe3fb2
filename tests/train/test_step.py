"""The account of a step does not depend on how its micro-batches are cut, or on attempts that broke off."""

from __future__ import annotations

import torch
from torch import Tensor

from ift_peft.train.losses import Sums
from ift_peft.train.step import Step, Totals

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
ROWS = [(6.0, 0.5, 2), (3.0, 0.25, 1)]  # cross-entropy, divergence, tokens, each guessed right


def sums(rows: list[tuple[float, float, int]]) -> Sums:
    entropy, divergence, tokens = (sum(column) for column in zip(*rows, strict=True))
    parts = {"cross_entropy": torch.tensor(float(entropy)), "kl_to_base": torch.tensor(float(divergence))}
    loss = torch.tensor(float(entropy + divergence), requires_grad=True) * 1.0
    return Sums(loss, parts, torch.tensor(float(tokens)), int(tokens))


def taken(*parts: list[tuple[float, float, int]], broken: int = 0, penalty: Tensor | None = None) -> Totals:
    """A step of two equal micro-batches in these parts, each begun `broken` times over before it is done."""
    step = Step()
    for _ in range(2):
        for _ in range(broken):
            step.begin_micro_batch()
            step.add_part(sums(parts[0]), torch.tensor(7.0))
        step.begin_micro_batch()
        for number, part in enumerate(parts):
            assert step.in_first_part == (number == 0)
            step.add_part(sums(part), penalty if number == 0 else None)
        step.end_micro_batch(torch.tensor(3.25), MASK)
    return step.read(torch.tensor(2.0), torch.device("cpu"))


def test_a_step_is_the_same_in_parts_and_after_attempts_that_broke_off() -> None:
    whole = taken(ROWS)
    assert (whole.norm, whole.loss, whole.cross_entropy) == (2.0, 6.5, 18.0)
    assert (whole.tokens, whole.read, whole.padded) == (6, 14, 16)
    assert whole.metrics == {
        "mean_token_accuracy": [1.0, 1.0],
        "cross_entropy": [3.0, 3.0],
        "kl_to_base": [0.25, 0.25],
    }
    assert taken(ROWS[:1], ROWS[1:]) == whole
    assert taken(ROWS[:1], ROWS[1:], broken=2) == whole


def test_a_penalty_counts_once_for_a_micro_batch_and_is_no_part_of_the_loss() -> None:
    penalised = taken(ROWS[:1], ROWS[1:], broken=1, penalty=torch.tensor(0.5))
    assert penalised.metrics.pop("orthogonality") == [0.5, 0.5]
    assert penalised == taken(ROWS)
