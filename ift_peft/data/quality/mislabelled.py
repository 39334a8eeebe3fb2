"""Rows whose label a classifier trained on the other rows finds wrong (confident learning, arXiv:1911.00068)."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FOLDS = 5  # and so many different texts a class must have
FEATURES = 50_000
WEAK = 0.85  # agreement below which many of the rows found are right
# The weaker the classifier, the surer it must be of a row: its probability for another label must be higher by this
# times the share of labels that it disagrees with. With 5 % of the labels of real reviews flipped, precision and recall
# are, beside those of `prune_by_noise_rate`, cleanlab's default, alone:
#   10,000 shopping reviews, agreement 0.87   0.68 and 0.64   0.56 and 0.78
#    1,000 shopping reviews, agreement 0.85   0.78 and 0.56   0.46 and 0.74
#    9,402 shipped reviews,  agreement 0.75   0.37 and 0.26   0.19 and 0.67
# (benchmarks/mislabelled.py)
MARGIN = 2.0
LEAST = 0.6  # agreement below which that margin is hardly ever reached, and silence would say nothing


@dataclass(frozen=True)
class Verdict:
    """Rows found, the surest first, each with the label expected of it, and how far to trust this.

    `agreement` is the share of all labels that the classifier predicts; too little of it, and nothing was `judged`.
    """

    rows: list[int]
    expected: list[str]
    agreement: float
    judged: bool = True


def judge(texts: Sequence[str], labels: Sequence[str], groups: Sequence[Hashable], *, seed: int) -> Verdict | None:
    """The rows that are probably mislabelled; None where fewer than two classes have enough texts.

    Rows of one group, copies of each other, are never on both sides of a fold: a wrong label would confirm itself.
    """
    judged, folds = _folds(labels, groups, seed)
    names = sorted({labels[number] for number in judged})
    if len(names) < 2:
        return None
    given = np.array([names.index(labels[number]) for number in judged])
    probabilities = _probabilities([texts[number] for number in judged], given, folds, seed)
    agreement = float((probabilities.argmax(axis=1) == given).mean())
    if agreement < LEAST:
        return Verdict([], [], agreement, judged=False)
    order = np.arange(len(given))
    others = probabilities.copy()
    others[order, given] = -1.0
    margin = others.max(axis=1) - probabilities[order, given]
    sure = _confident(given, probabilities) & (margin >= MARGIN * (1 - agreement))
    found = sorted(np.flatnonzero(sure).tolist(), key=lambda at: -margin[at])
    return Verdict([judged[at] for at in found], [names[int(others[at].argmax())] for at in found], agreement)


def _folds(labels: Sequence[str], groups: Sequence[Hashable], seed: int) -> tuple[list[int], NDArray[np.int64]]:
    """The rows of classes with enough groups, and the fold of each: the groups of each class dealt out in turn."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        members[group].append(number)
    strata: dict[str, list[list[int]]] = defaultdict(list)
    for numbers in members.values():
        strata[labels[numbers[0]]].append(numbers)
    rng = random.Random(seed)
    fold_of: dict[int, int] = {}
    for label, stratum in sorted(strata.items()):
        if len(stratum) < FOLDS:
            continue
        for at, numbers in enumerate(rng.sample(stratum, len(stratum))):
            # Rows that contradict the first of their group are for another check.
            fold_of.update((number, at % FOLDS) for number in numbers if labels[number] == label)
    judged = sorted(fold_of)
    return judged, np.array([fold_of[number] for number in judged])


def _probabilities(
    texts: Sequence[str], given: NDArray[np.int64], folds: NDArray[np.int64], seed: int
) -> NDArray[np.float64]:
    """Out-of-fold probabilities of each class, shape (texts, classes)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    # The vectoriser sees no labels, so that it may see all texts at once.
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True, max_features=FEATURES)
    # SAGA takes seconds where the default solver takes a minute: 10,000 texts of 15 classes.
    classifier = LogisticRegression(C=3.0, solver="saga", tol=0.01, max_iter=1000, random_state=seed)
    probabilities: NDArray[np.float64] = cross_val_predict(
        classifier, vectorizer.fit_transform(texts), given, cv=PredefinedSplit(folds), method="predict_proba"
    )
    return probabilities


def _confident(given: NDArray[np.int64], probabilities: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Rows off the diagonal of the confident joint: surer to be of another class than rows of that class are of it."""
    from cleanlab.filter import find_label_issues

    mask: NDArray[np.bool_] = find_label_issues(given, probabilities, filter_by="confident_learning", n_jobs=1)
    return mask
