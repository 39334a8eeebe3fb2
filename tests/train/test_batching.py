from __future__ import annotations

import random

from ift_peft.train.batching import LengthGroupedSampler

LENGTHS = [(i * 7919) % 197 + 3 for i in range(1003)]


def batches(sampler: LengthGroupedSampler) -> list[list[int]]:
    order = list(sampler)
    return [order[start : start + 8] for start in range(0, len(order), 8)]


def test_every_row_comes_once_an_epoch_in_an_order_of_seed_and_epoch_alone() -> None:
    sampler = LengthGroupedSampler(LENGTHS, batch_size=8, seed=1)
    first = list(sampler)
    random.seed(5)
    assert sorted(first) == list(range(len(LENGTHS)))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGroupedSampler(LENGTHS, batch_size=8, seed=2)) != first


def test_batches_hold_rows_of_like_length_and_the_longest_come_first() -> None:
    rows = batches(LengthGroupedSampler(LENGTHS, batch_size=8, seed=1))
    padded = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in rows)
    assert padded < 1.05 * sum(LENGTHS)
    assert max(LENGTHS[row] for row in rows[0]) == max(LENGTHS)
    assert all(len(batch) == 8 for batch in rows[:-1])


def test_fewer_rows_than_a_batch_are_one_batch() -> None:
    assert sorted(LengthGroupedSampler([3, 1, 2], batch_size=8, seed=0)) == [0, 1, 2]
