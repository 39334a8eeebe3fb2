from __future__ import annotations

import random
from typing import Any

import numpy as np

from ift_peft.train.batching import Epochs, EpochSampler

LENGTHS = [(i * 7919) % 197 + 3 for i in range(1003)]


def sampler(lengths: list[int] = LENGTHS, *, seed: int = 1, **settings: Any) -> EpochSampler:
    return EpochSampler(lengths, Epochs(rows=len(lengths)), batch_size=8, seed=seed, **settings)


def batches(order: EpochSampler) -> list[list[int]]:
    rows = list(order)
    return [rows[start : start + 8] for start in range(0, len(rows), 8)]


def test_every_row_comes_once_an_epoch_in_an_order_of_seed_and_epoch_alone() -> None:
    ours = sampler()
    first = list(ours)
    random.seed(5)
    assert sorted(first) == list(range(len(LENGTHS)))
    assert list(ours) == first
    ours.set_epoch(1)
    assert list(ours) != first
    assert list(sampler(seed=2)) != first


def test_batches_hold_rows_of_like_length_and_the_longest_come_first() -> None:
    rows = batches(sampler())
    padded = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in rows)
    assert padded < 1.05 * sum(LENGTHS)
    assert max(LENGTHS[row] for row in rows[0]) == max(LENGTHS)
    assert all(len(batch) == 8 for batch in rows[:-1])


def test_other_strategies_take_the_order_of_the_rows_or_none() -> None:
    assert list(sampler(strategy="sequential")) == list(range(len(LENGTHS)))
    shuffled = list(sampler(strategy="random"))
    assert sorted(shuffled) == list(range(len(LENGTHS))) != shuffled


def test_fewer_rows_than_a_batch_are_one_batch() -> None:
    assert sorted(sampler([3, 1, 2], seed=0)) == [0, 1, 2]


def test_each_epoch_takes_its_own_rendering_of_every_row() -> None:
    epochs = Epochs(rows=5, variants=3)
    for epoch in range(7):
        assert epochs.renderings(epoch).tolist() == [row * 3 + epoch % 3 for row in range(5)]


def test_weights_say_how_often_the_rows_of_a_source_are_seen() -> None:
    sources = np.array([0] * 10 + [1] * 40, dtype=np.int32)
    epochs = Epochs(rows=50, sources=sources, weights=(2.5, 0.25))
    drawn = [epochs.renderings(epoch) for epoch in range(200)]
    assert {len(rows) for rows in drawn} == {len(epochs)} == {25 + 10}
    for rows in drawn:
        counts = np.bincount(rows, minlength=50)
        assert set(counts[:10]) == {2, 3}
        assert set(counts[10:]) == {0, 1}
    seen = np.bincount(np.concatenate(drawn), minlength=50) / len(drawn)
    assert abs(seen[:10] - 2.5).max() < 0.15
    assert abs(seen[10:] - 0.25).max() < 0.15
    assert drawn[3].tolist() == epochs.renderings(3).tolist()
