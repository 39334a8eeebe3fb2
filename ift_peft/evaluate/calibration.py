"""Whether the probabilities that a classifier gives are right: calibration error, Brier score and log loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ift_peft.evaluate.intervals import Floats
from ift_peft.evaluate.metrics import Resampling
from ift_peft.evaluate.rowwise import compared, mean, with_ones

BINS = 15


def expected_calibration_error(sums: Floats) -> Floats:
    """Of the sums of `calibration_rows`: the mean over rows of |accuracy - confidence| of the bin each falls into.

    Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv:1706.04599), equation 3.
    """
    rows, hits, confidence = (sums[:, start : start + BINS] for start in range(0, 3 * BINS, BINS))
    return np.asarray(np.abs(hits - confidence).sum(axis=1) / rows.sum(axis=1))


def calibration_rows(truth: Sequence[int], probabilities: Floats) -> Floats:
    """What each row adds to its bin: itself, whether it was right, its confidence. Shape (rows, 3 * BINS).

    The confidence is the probability of the answer given; bins are of equal width and closed on the right.
    """
    confidence = probabilities.max(axis=1)
    hits = probabilities.argmax(axis=1) == np.asarray(truth)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    rows = np.zeros((len(confidence), 3, BINS))
    rows[np.arange(len(confidence)), :, bins] = np.stack([np.ones(len(confidence)), hits, confidence], axis=1)
    return rows.reshape(len(confidence), 3 * BINS)


def brier_rows(truth: Sequence[int], probabilities: Floats) -> Floats:
    """The squared error of each row's probabilities, summed over the classes: 0 to 2 (Brier 1950)."""
    wanted = np.eye(probabilities.shape[1])[np.asarray(truth)]
    return np.asarray(((probabilities - wanted) ** 2).sum(axis=1))


def nll_rows(truth: Sequence[int], probabilities: Floats) -> Floats:
    """Nats by which each true class was missed; probabilities below the float64 epsilon count as that."""
    given = probabilities[np.arange(len(probabilities)), np.asarray(truth)]
    return np.asarray(-np.log(np.maximum(given, np.finfo(np.float64).eps)))


def calibration_scores(truth: Sequence[int], base: Floats, adapter: Floats, resampling: Resampling) -> dict[str, Any]:
    """`ece`, `brier` and `nll` of base, adapter and change with intervals, and the bins that the first is made of.

    The calibration error is never negative, and a resample's is larger than that of the rows it was drawn from; its
    interval is made of deviations from the resamples' mean.
    """
    both = (base, adapter)
    in_bins = [calibration_rows(truth, probabilities) for probabilities in both]
    brier = [with_ones(brier_rows(truth, probabilities)) for probabilities in both]
    nll = [with_ones(nll_rows(truth, probabilities)) for probabilities in both]
    found = {
        "ece": compared(in_bins[0], in_bins[1], score=expected_calibration_error, resampling=resampling, biased=True),
        "brier": compared(brier[0], brier[1], score=mean, resampling=resampling),
        "nll": compared(nll[0], nll[1], score=mean, resampling=resampling),
    }
    scores: dict[str, Any] = {
        who: {name: getattr(one, who).to_json() for name, one in found.items()} for who in ("base", "adapter", "change")
    }
    for who in ("base", "adapter"):  # distances are not below 0
        scores[who]["ece"]["low"] = max(0.0, scores[who]["ece"]["low"])
    scores["bins"] = {who: _bins(rows) for who, rows in zip(("base", "adapter"), in_bins, strict=True)}
    return scores


def _bins(rows: Floats) -> list[dict[str, float]]:
    """Each bin that has rows: its upper bound, its rows, and their mean confidence and accuracy."""
    number, hits, confidence = rows.sum(axis=0).reshape(3, BINS)
    return [
        {
            "up_to": round((index + 1) / BINS, 6),
            "rows": int(number[index]),
            "confidence": round(float(confidence[index] / number[index]), 6),
            "accuracy": round(float(hits[index] / number[index]), 6),
        }
        for index in range(BINS)
        if number[index]
    ]
