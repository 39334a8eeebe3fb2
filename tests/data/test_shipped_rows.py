"""The rows that ship: balanced, valid, and the test rows not among the training rows, nor nearly."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from ift_peft.recipe import recipes_root

REVIEWS = recipes_root() / "data" / "reviews"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (REVIEWS / f"{name}.jsonl").read_text("utf-8").splitlines()]


def trigrams(text: str) -> set[str]:
    text = re.sub(r"\W", "", text.lower())
    return {text[i : i + 3] for i in range(max(1, len(text) - 2))}


def test_reviews_are_enough_and_balanced() -> None:
    for name, least in (("train", 800), ("test", 300)):
        labels = Counter((row["language"], row["label"]) for row in rows(name))
        assert sum(labels.values()) >= least
        for language in ("zh", "en"):
            assert 0.95 < labels[language, "正面"] / labels[language, "负面"] < 1.05
        assert len({row["domain"] for row in rows(name)}) == 14
        assert {row["style"] for row in rows(name)} == {"plain", "hedged", "mixed", "ironic"}
        assert len({row["text"] for row in rows(name)}) == len(rows(name))


@pytest.mark.slow
def test_no_training_review_nearly_equals_a_test_review() -> None:
    test = [trigrams(row["text"]) for row in rows("test")]
    index: dict[str, list[int]] = {}
    for number, grams in enumerate(test):
        for gram in grams:
            index.setdefault(gram, []).append(number)
    for row in rows("train"):
        grams = trigrams(row["text"])
        shared = Counter(number for gram in grams for number in index.get(gram, ()))
        for number, common in shared.items():
            assert common / len(grams | test[number]) < 0.4, (row["text"], number)
