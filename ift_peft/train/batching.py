"""Which rows share a batch: rows of like length, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

POOL = 50  # batches whose rows are sorted by length together; larger pools pad less and mix less
Integers = NDArray[np.int64]
Strategy = Literal["group_by_length", "random", "sequential"]


@dataclass(frozen=True)
class Epochs:
    """Which renderings each epoch holds, out of `variants` for each of `rows`.

    A source with weight 2.5 gives all its rows twice and half of them, drawn anew each epoch, once more, so that every
    epoch has the same number of rows. `sources` is the source of each row, shape (rows,); None: there is but one.
    """

    rows: int
    variants: int = 1
    sources: NDArray[np.int32] | None = None
    weights: tuple[float, ...] = (1.0,)
    seed: int = 0

    def __len__(self) -> int:
        if self.sources is None:
            return _seen(self.rows, self.weights[0])
        counts = np.bincount(self.sources, minlength=len(self.weights))
        return sum(_seen(int(count), weight) for count, weight in zip(counts, self.weights, strict=True))

    def renderings(self, epoch: int) -> Integers:
        """Numbers of the renderings of one epoch, in no meaningful order, shape (len(self),)."""
        parts = []
        for source, weight in enumerate(self.weights):
            rows = np.arange(self.rows) if self.sources is None else np.flatnonzero(self.sources == source)
            whole, part = divmod(_seen(len(rows), weight), max(1, len(rows)))
            parts += [rows] * whole
            if part:
                parts.append(np.random.default_rng((self.seed, epoch, source)).choice(rows, part, replace=False))
        return np.concatenate(parts) * self.variants + epoch % self.variants


def _seen(rows: int, weight: float) -> int:
    return max(1, round(rows * weight)) if rows else 0


class EpochSampler(Sampler[int]):
    """Numbers of renderings such that each run of `batch_size` has rows of like length.

    transformers' sampler by length draws from the global generator, so a run resumed within an epoch sees other
    batches than one that was not interrupted; here the order of an epoch is a function of (seed, epoch). The first
    batch holds the longest rows, so that memory runs out at once if at all.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int32],
        epochs: Epochs,
        *,
        batch_size: int,
        seed: int,
        strategy: Strategy = "group_by_length",
    ) -> None:
        self.lengths, self.epochs, self.batch_size, self.seed = np.asarray(lengths), epochs, batch_size, seed
        self.strategy = strategy
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.epochs)

    def __iter__(self) -> Iterator[int]:
        order = self.epochs.renderings(self.epoch)
        rng = np.random.default_rng((self.seed, self.epoch))
        if self.strategy != "sequential":
            rng.shuffle(order)
        if self.strategy == "group_by_length":
            order = self._grouped(order, rng)
        return iter(order.tolist())

    def _grouped(self, order: Integers, rng: np.random.Generator) -> Integers:
        pool = POOL * self.batch_size
        batches: list[Integers] = []
        for start in range(0, len(order), pool):
            together = order[start : start + pool]
            together = together[np.argsort(-self.lengths[together], kind="stable")]
            batches += [together[at : at + self.batch_size] for at in range(0, len(together), self.batch_size)]
        short = batches.pop() if len(batches[-1]) < self.batch_size else None
        batches = [batches[at] for at in rng.permutation(len(batches))]
        if batches:
            longest = max(range(len(batches)), key=lambda at: self.lengths[batches[at][0]])
            batches[0], batches[longest] = batches[longest], batches[0]
        if short is not None:
            batches.append(short)
        return np.concatenate(batches)
