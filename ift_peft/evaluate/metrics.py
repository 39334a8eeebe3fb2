"""Metrics of classification and of language modelling, each with its interval, and what the adapter changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ift_peft.evaluate.intervals import Estimate, Floats, bootstrap_mean_ratio, percentile, resample_cells, wilson

Counts = NDArray[np.int64]
Metrics = dict[str, Estimate]


@dataclass(frozen=True)
class Resampling:
    """How intervals are made."""

    samples: int = 2000
    confidence: float = 0.95
    seed: int = 0

    def describe(self) -> str:
        percent = f"{100 * self.confidence:g} %"
        return (
            f"{percent} intervals: Wilson for accuracy and exact match, "
            f"bootstrap over rows ({self.samples} resamples) for the others"
        )


def confusion(truth: Sequence[int], predicted: Sequence[int], classes: int) -> Counts:
    """Counts of shape (classes, classes); rows are the truth, columns the prediction."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (np.asarray(truth), np.asarray(predicted)), 1)
    return matrix


def macro_scores(matrices: Counts) -> dict[str, Floats]:
    """accuracy and macro precision, recall, F1 of confusion matrices of shape (…, classes, classes).

    A class that is never predicted has precision 0 and one that never occurs has recall 0, as in scikit-learn with
    zero_division=0; the mean is over classes that occur or are predicted in that matrix.
    """
    hits = np.diagonal(matrices, axis1=-2, axis2=-1).astype(float)
    predicted, actual = matrices.sum(axis=-2).astype(float), matrices.sum(axis=-1).astype(float)
    precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
    recall = np.divide(hits, actual, out=np.zeros_like(hits), where=actual > 0)
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(hits), where=both > 0)
    present = np.maximum((predicted + actual > 0).sum(axis=-1), 1)
    return {
        "accuracy": hits.sum(axis=-1) / matrices.sum(axis=(-2, -1)),
        "precision": precision.sum(axis=-1) / present,
        "recall": recall.sum(axis=-1) / present,
        "f1": f1.sum(axis=-1) / present,
    }


def classification_metrics(matrix: Counts, resampling: Resampling) -> Metrics:
    """accuracy, and macro precision, recall and F1, of one confusion matrix."""
    values = macro_scores(matrix)
    drawn = macro_scores(resample_cells(matrix, samples=resampling.samples, seed=resampling.seed))
    metrics = {name: percentile(float(values[name]), drawn[name], confidence=resampling.confidence) for name in values}
    total = int(matrix.sum())
    metrics["accuracy"] = wilson(int(np.trace(matrix)), total, confidence=resampling.confidence)
    return metrics


def classification_change(
    truth: Sequence[int], base: Sequence[int], adapter: Sequence[int], classes: int, resampling: Resampling
) -> Metrics:
    """Adapter minus base, by a paired bootstrap: both are scored on the same resampled rows."""
    joint = np.zeros((classes, classes, classes), dtype=np.int64)
    np.add.at(joint, (np.asarray(truth), np.asarray(base), np.asarray(adapter)), 1)
    drawn = resample_cells(joint, samples=resampling.samples, seed=resampling.seed)
    before, after = macro_scores(joint.sum(axis=2)), macro_scores(joint.sum(axis=1))
    drawn_before, drawn_after = macro_scores(drawn.sum(axis=3)), macro_scores(drawn.sum(axis=2))
    return {
        name: percentile(
            float(after[name] - before[name]), drawn_after[name] - drawn_before[name], confidence=resampling.confidence
        )
        for name in before
    }


def per_class(matrix: Counts, labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """precision, recall, F1 and support of each class."""
    result = {}
    for index, label in enumerate(labels):
        hit, predicted, actual = matrix[index, index], matrix[:, index].sum(), matrix[index].sum()
        precision = float(hit / predicted) if predicted else 0.0
        recall = float(hit / actual) if actual else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        result[label] = {"precision": precision, "recall": recall, "f1": f1, "support": int(actual)}
    return result


def language_metrics(log_probabilities: Floats, tokens: Floats, resampling: Resampling) -> Metrics:
    """loss (nats per supervised token) and perplexity over rows with these log probabilities and token counts."""
    metrics = {}
    for name, transform in (("loss", np.asarray), ("perplexity", np.exp)):
        value, drawn = bootstrap_mean_ratio(
            -log_probabilities, tokens, samples=resampling.samples, seed=resampling.seed, transform=transform
        )
        metrics[name] = percentile(value, drawn, confidence=resampling.confidence)
    return metrics


def language_change(base: Floats, adapter: Floats, tokens: Floats, resampling: Resampling) -> Metrics:
    """Adapter minus base loss, paired: the same resampled rows for both."""
    value, drawn = bootstrap_mean_ratio(base - adapter, tokens, samples=resampling.samples, seed=resampling.seed)
    return {"loss": percentile(value, drawn, confidence=resampling.confidence)}


def to_json(metrics: Metrics) -> dict[str, Any]:
    return {name: estimate.to_json() for name, estimate in metrics.items()}
