from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from ift_peft.evaluate import metrics
from ift_peft.evaluate.intervals import percentile, resample_cells, wilson
from ift_peft.evaluate.metrics import Resampling


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_scores_are_scikit_learns(classes: int) -> None:
    rng = np.random.default_rng(classes)
    truth = rng.integers(classes, size=200).tolist()
    predicted = [t if rng.random() < 0.6 else int(rng.integers(classes)) for t in truth]
    matrix = metrics.confusion(truth, predicted, classes)
    ours = metrics.macro_scores(matrix)
    precision, recall, f1, _ = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)
    assert float(ours["accuracy"]) == pytest.approx(accuracy_score(truth, predicted))
    assert [float(ours[name]) for name in ("precision", "recall", "f1")] == pytest.approx([precision, recall, f1])
    per_class = metrics.per_class(matrix, [str(i) for i in range(classes)])
    theirs = precision_recall_fscore_support(truth, predicted, average=None, zero_division=0, labels=range(classes))
    for index in range(classes):
        assert list(per_class[str(index)].values()) == pytest.approx([column[index] for column in theirs])


def test_a_model_that_always_says_the_same_scores_as_in_scikit_learn() -> None:
    truth, predicted = [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]
    ours = metrics.macro_scores(metrics.confusion(truth, predicted, 2))
    theirs = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)[:3]
    assert [float(ours[name]) for name in ("precision", "recall", "f1")] == pytest.approx(list(theirs))


def test_wilson_agrees_with_published_values() -> None:
    """Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: 81/263, 15/148, 0/20, 1/29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (hits, trials), bounds in published.items():
        interval = wilson(hits, trials, confidence=0.95)
        assert (interval.low, interval.high) == pytest.approx(bounds, abs=5e-5)


def test_resampling_cells_is_resampling_rows() -> None:
    """Mean and variance of a resampled accuracy are those of a binomial."""
    drawn = resample_cells(np.array([[30, 10], [20, 40]]), samples=20_000, seed=0)
    accuracy = metrics.macro_scores(drawn)["accuracy"]
    assert (drawn.sum(axis=(1, 2)) == 100).all()
    assert accuracy.mean() == pytest.approx(0.7, abs=2e-3)
    assert accuracy.std() == pytest.approx((0.7 * 0.3 / 100) ** 0.5, rel=0.03)


def test_a_paired_change_is_narrower_than_the_two_intervals_apart() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=300)
    base = np.where(rng.random(300) < 0.7, truth, 1 - truth)
    adapter = np.where((base != truth) & (rng.random(300) < 0.3), truth, base)  # never worse on any row
    resampling = Resampling(samples=2000)
    change = metrics.classification_change(truth.tolist(), base.tolist(), adapter.tolist(), 2, resampling)["accuracy"]
    one = metrics.classification_metrics(metrics.confusion(truth.tolist(), base.tolist(), 2), resampling)["accuracy"]
    assert change.value == pytest.approx(float((adapter == truth).mean() - (base == truth).mean()))
    assert 0 < change.low < change.value < change.high
    assert change.high - change.low < one.high - one.low


def test_loss_and_perplexity_weigh_rows_by_their_tokens() -> None:
    estimates = metrics.language_metrics(np.array([-2.0, -12.0]), np.array([1.0, 3.0]), Resampling(samples=500))
    assert estimates["loss"].value == pytest.approx(14 / 4)
    assert estimates["perplexity"].value == pytest.approx(np.exp(14 / 4))
    assert estimates["loss"].low == pytest.approx(2.0)
    assert estimates["loss"].high == pytest.approx(4.0)


def test_the_percentile_interval_covers_its_share() -> None:
    estimate = percentile(0.5, np.linspace(0, 1, 1001), confidence=0.9)
    assert (estimate.low, estimate.high) == pytest.approx((0.05, 0.95))
