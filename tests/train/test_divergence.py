"""When a training has lost what its base knew, and when it only looks so."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

import numpy as np
import pytest

from ift_peft.errors import Diverged
from ift_peft.train.batching import Epochs, EpochSampler
from ift_peft.train.divergence import FIRST, RISEN, Guard, window
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
    assert judged([2.85, *[stuck] * 99]) == FIRST + window(100, least=FIRST) == 15
    assert judged([2.85, 22.0, 30.0, *[stuck] * 9]) == 10
    assert judged([2.85, *[stuck] * 5], tokens=4) == 6  # a short run, at its last step


def test_a_loss_far_above_its_start_is_found_where_rows_come_in_no_order() -> None:
    far = [1.0, 1.1, 0.9, 1.0, 1.2, *[4.0 + 0.1 * step for step in range(35)]]
    assert judged(far, tokens=1000) == FIRST + RISEN
    assert judged(far[:22], tokens=1000) == 22  # a short run, at its end, by its last half
    assert judged([*far[:20], 1.0, *far[20:]], tokens=1000) == 41  # one batch is as it was: it may be a mix
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
def test_noise_about_one_level_is_no_divergence(choices: int, level: float) -> None:
    """Losses of steps of one token each, drawn about one level: one kind of rows that nothing is learnt of."""
    drawn = random.Random(0)
    for steps in (6, 12, 40, 200):
        for _ in range(300):
            losses = [max(0.0, drawn.gauss(level, min(1.5, level / 2))) for _ in range(steps)]
            assert judged(losses, choices=choices, tokens=1) is None


@pytest.mark.parametrize("steps", [12, 20, 24, 25, 40, 100, 200])
@pytest.mark.parametrize("share", [0.5, 0.6, 0.7, 0.8])
def test_a_mix_whose_batches_are_of_one_kind_each_is_no_divergence(share: float, steps: int) -> None:
    """Long rows that are easy and short ones that are hard, in the order in which they are trained; none is learnt."""
    size, tokens = 8, 100
    for seed in range(40):
        drawn = np.random.default_rng(seed)
        long = drawn.random(size * steps) < share
        lengths = np.where(long, drawn.integers(300, 600, len(long)), drawn.integers(20, 60, len(long)))
        level = np.where(long, drawn.normal(0.4, 0.15, len(long)), drawn.normal(2.6, 0.5, len(long)))
        order = list(EpochSampler(lengths, Epochs(rows=len(long)), batch_size=size, seed=seed))
        losses = level[order].reshape(steps, size).mean(axis=1)
        assert judged(losses.tolist(), choices=151_936, tokens=tokens) is None, seed
