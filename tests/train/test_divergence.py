"""When a training has lost what its base knew, and when it only looks so."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import pytest

from ift_peft.errors import Diverged
from ift_peft.train.divergence import Guard, window
from ift_peft.train.progress import Progress

TOKENS = 8_192


def judged(losses: Iterable[float], *, choices: int = TOKENS, tokens: int = 64, shuffled: bool = True) -> int | None:
    """The step in which a training of these losses was called diverged, counted from 1; None where it never was."""
    losses, progress = list(losses), Progress()
    guard = Guard(choices, len(losses), shuffled=shuffled)
    for step, loss in enumerate(losses, start=1):
        try:
            guard.add(progress, loss, tokens=tokens, step=step)
        except Diverged:
            return step
    return None


def test_a_loss_stuck_at_guessing_is_found_as_soon_as_it_is_certain() -> None:
    stuck = math.log(TOKENS)
    assert judged([2.85, *[stuck] * 11]) == 10
    assert judged([2.85, *[stuck] * 99]) == 5 + window(100) == 15
    assert judged([2.85, 22.0, 30.0, *[stuck] * 9]) == 10
    assert judged([2.85, *[stuck] * 5], tokens=4) == 6  # a short run, at its last step


def test_a_loss_far_above_its_start_is_found_where_rows_come_in_no_order() -> None:
    far = [1.0, 1.1, 0.9, 1.0, 1.2, *[4.0 + 0.1 * step for step in range(15)]]
    assert judged(far, tokens=1000) == 10
    assert judged(far, tokens=1000, shuffled=False) is None  # from easy rows to hard ones


@pytest.mark.parametrize(
    "losses",
    [
        [2.85, 27.8, 19.8, 16.0, 24.4, 7.8, 6.4, 3.9, 3.0, 2.7, 2.0, 1.5],  # it came back
        [9.0] * 30,  # a base that has only ever guessed, and learns nothing
        [0.01, 0.02, 0.01, 0.02, 0.01, *[0.3] * 20],  # from nearly nothing to little
        [0.5, 3.0, 2.9, 3.1, 3.0, *[2.6] * 20],  # the longest rows first, and they are the easiest
        [2.85, 9.0, 9.0],  # too short to tell
    ],
)
def test_what_only_looks_lost_is_left_alone(losses: list[float]) -> None:
    assert judged(losses) is None


@pytest.mark.parametrize(("choices", "level"), [(2, 0.69), (150, 5.0), (TOKENS, 3.0)])
def test_noise_of_single_rows_is_no_divergence(choices: int, level: float) -> None:
    drawn = random.Random(0)
    for steps in (6, 12, 40, 200):
        for _ in range(300):
            losses = [max(0.0, drawn.gauss(level, min(1.5, level / 2))) for _ in range(steps)]
            assert judged(losses, choices=choices, tokens=1) is None
