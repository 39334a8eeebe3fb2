"""Which rows share a batch: rows of like length, in an order that depends on seed and epoch alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

POOL = 50  # batches whose rows are sorted by length together; larger pools pad less and mix less


class LengthGroupedSampler(Sampler[int]):
    """Row numbers such that each run of `batch_size` has rows of like length.

    transformers' sampler of this name draws from the global generator, so a run resumed within an epoch sees other
    batches than one that was not interrupted; here the order of an epoch is a function of (seed, epoch). The first
    batch holds the longest rows, so that memory runs out at once if at all.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}:{self.epoch}")  # noqa: S311
        order = rng.sample(range(len(self.lengths)), len(self.lengths))
        pool = POOL * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            together = sorted(order[start : start + pool], key=lambda row: -self.lengths[row])
            batches.extend(together[at : at + self.batch_size] for at in range(0, len(together), self.batch_size))
        short = batches.pop() if len(batches[-1]) < self.batch_size else None
        rng.shuffle(batches)
        if batches:
            longest = max(range(len(batches)), key=lambda at: self.lengths[batches[at][0]])
            batches[0], batches[longest] = batches[longest], batches[0]
        if short is not None:
            batches.append(short)
        return iter([row for batch in batches for row in batch])
