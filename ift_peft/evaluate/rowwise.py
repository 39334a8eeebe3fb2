"""Scores that follow from sums over rows: bootstrap intervals, and the paired change from base to adapter.

Each row adds a few numbers, such as matches and lengths, and a score is a function of their sums. A resample of rows is
then a weighting of the rows, and no text is looked at twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ift_peft.evaluate.intervals import Estimate, Floats, percentile
from ift_peft.evaluate.metrics import Resampling

Score = Callable[[Floats], Floats]
"""Of sums of shape (n, columns), the n scores."""

WEIGHTS_AT_ONCE = 4_000_000  # 32 MB


@dataclass(frozen=True)
class Compared:
    """One score of base and adapter, and `change`: adapter minus base on the same resampled rows."""

    base: Estimate
    adapter: Estimate
    change: Estimate


def mean(sums: Floats) -> Floats:
    """The score of rows that add (score, 1)."""
    return np.asarray(sums[:, 0] / sums[:, 1])


def with_ones(scores: Floats) -> Floats:
    """Scores of rows as what `mean` takes."""
    return np.stack([scores, np.ones_like(scores)], axis=1)


def compared(base: Floats, adapter: Floats, *, score: Score, resampling: Resampling, biased: bool = False) -> Compared:
    """`score` of what base and adapter add in each row, both of shape (rows, columns).

    The intervals are percentiles of the resamples. Of a `biased` score, that comes out differently in a resample than
    in the rows it was drawn from, they are percentiles of the resamples' deviations from their own mean.
    """
    drawn_sums = np.concatenate(list(_resampled_sums(np.hstack([base, adapter]), resampling)))
    drawn = [score(sums) for sums in np.split(drawn_sums, 2, axis=1)]
    values = [float(score(rows.sum(axis=0)[None])[0]) for rows in (base, adapter)]
    triples = [*zip(values, drawn, strict=True), (values[1] - values[0], drawn[1] - drawn[0])]
    if biased:
        triples = [(value, value + samples - samples.mean()) for value, samples in triples]
    return Compared(*(percentile(value, samples, confidence=resampling.confidence) for value, samples in triples))


def _resampled_sums(rows: Floats, resampling: Resampling) -> Iterator[Floats]:
    """Sums over rows drawn with replacement, shape (resamples, columns), some of the resamples at a time."""
    rng = np.random.default_rng(resampling.seed)
    number = len(rows)
    step = max(1, WEIGHTS_AT_ONCE // number)
    for start in range(0, resampling.samples, step):
        size = min(step, resampling.samples - start)
        yield rng.multinomial(number, np.full(number, 1 / number), size=size).astype(np.float64) @ rows
