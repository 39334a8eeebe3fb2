"""Values with confidence intervals: Wilson's for proportions, the percentile bootstrap for nearly everything else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A measured value and the bounds of its confidence interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": round(self.value, 6), "low": round(self.low, 6), "high": round(self.high, 6)}


def wilson(successes: int, trials: int, *, confidence: float) -> Estimate:
    """The Wilson score interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def paired_change(before: Sequence[bool], after: Sequence[bool], *, confidence: float) -> Estimate:
    """The share of rows that are true `after` minus that `before`, of the same rows.

    Method 10 of Newcombe 1998 (Statistics in Medicine 17, 2635-2650), made of Wilson's intervals: unlike the bootstrap
    it is not [0, 0] where no row of a few changed.
    """
    rows = len(before)
    pairs = Counter(zip(before, after, strict=True))
    both, gained, lost = pairs[True, True], pairs[False, True], pairs[True, False]
    neither = rows - both - gained - lost
    new, old = wilson(both + gained, rows, confidence=confidence), wilson(both + lost, rows, confidence=confidence)
    spread = math.sqrt(float((both + gained) * (neither + lost) * (both + lost) * (neither + gained)))
    agreement = float(both * neither - gained * lost)
    if agreement > 0:
        agreement = max(0.0, agreement - rows / 2)
    phi = agreement / spread if spread else 0.0

    def half(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))

    change = new.value - old.value
    return Estimate(
        change,
        change - half(new.value - new.low, old.high - old.value),
        change + half(new.high - new.value, old.value - old.low),
    )


def percentile(value: float, samples: Floats, *, confidence: float) -> Estimate:
    """The percentile interval of bootstrap `samples` around a measured `value` (Efron 1979)."""
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(samples, [tail, 100 - tail])
    return Estimate(float(value), float(low), float(high))


def resample_cells(counts: NDArray[np.int64], *, samples: int, seed: int) -> NDArray[np.int64]:
    """Bootstrap resamples of rows that fall into cells, shape (samples, *counts.shape).

    Drawing rows with replacement and counting them per cell is one multinomial draw; no row is copied.
    """
    rng = np.random.default_rng(seed)
    total = int(counts.sum())
    drawn = rng.multinomial(total, (counts / total).ravel(), size=samples)
    return drawn.reshape(samples, *counts.shape)


def bootstrap_mean_ratio(
    numerators: Floats,
    denominators: Floats,
    *,
    samples: int,
    seed: int,
    transform: Callable[[Floats], Floats] = lambda x: x,
) -> tuple[float, Floats]:
    """`transform(sum(numerators) / sum(denominators))` over rows, and its value in each bootstrap resample of rows."""
    rng = np.random.default_rng(seed)
    rows = len(numerators)
    ratios = np.empty(samples)
    for index in range(samples):
        drawn = rng.integers(rows, size=rows)
        ratios[index] = numerators[drawn].sum() / denominators[drawn].sum()
    whole = np.array([numerators.sum() / denominators.sum()])
    return float(transform(whole)[0]), transform(ratios)
