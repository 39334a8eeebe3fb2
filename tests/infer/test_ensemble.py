"""Probabilities of several members made into one set."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from scipy.special import softmax

from ift_peft.data.render import Renderer
from ift_peft.data.row import ask
from ift_peft.infer.ensemble import Member, answer_together, together
from ift_peft.infer.load import Parts, Question
from ift_peft.infer.stacked import StackedAdapters
from ift_peft.infer.temperature import at_temperature, fit_temperature
from ift_peft.stages import Kind
from tests.infer.adapters import make_adapter

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 20, 4)) * 5
ALL = softmax(LOGITS, axis=-1)


@pytest.mark.parametrize("kind", ["mean_logits", "mean_probs"])
def test_one_member_twice_is_that_member(kind: Kind) -> None:
    assert together(ALL[[0, 0]], kind) == pytest.approx(ALL[0])


def test_mean_logits_is_the_softmax_of_the_mean_logits_whatever_is_added_to_all_labels() -> None:
    assert together(ALL, "mean_logits") == pytest.approx(softmax(LOGITS.mean(axis=0), axis=-1))
    assert together(ALL, "mean_probs") == pytest.approx(ALL.mean(axis=0))


def test_a_probability_of_zero_rules_a_label_out_and_nothing_is_nan() -> None:
    found = together(np.array([[[0.0, 0.4, 0.6]], [[0.9, 0.1, 0.0]]]), "mean_logits")
    assert np.isfinite(found).all() and found.argmax() == 1
    assert found.sum() == pytest.approx(1)


def test_a_vote_is_the_share_of_members_and_the_mean_decides_ties_alone() -> None:
    outvoted = np.array([[[0.51, 0.49, 0.0]], [[0.51, 0.49, 0.0]], [[0.0, 1.0, 0.0]]])
    assert together(outvoted, "vote") == pytest.approx(np.array([[2 / 3, 1 / 3, 0]]), abs=1e-6)
    assert together(outvoted, "mean_probs").argmax() == 1
    tied = np.array([[[0.6, 0.4, 0.0]], [[0.1, 0.9, 0.0]]])
    assert together(tied, "vote").argmax() == 1 and together(tied[::-1], "vote").argmax() == 1
    assert together(tied, "vote") == pytest.approx(np.array([[0.5, 0.5, 0]]), abs=1e-6)
    unvoted = np.array([[[0.4, 0.0, 0.6]], [[0.4, 0.6, 0.0]]])  # the likeliest by the mean has no vote
    assert together(unvoted, "mean_probs").argmax() == 0 and together(unvoted, "vote").argmax() != 0


def test_a_temperature_makes_probabilities_as_sure_as_they_are_right() -> None:
    """Draws from known probabilities that are then made too sure: the temperature takes that back."""
    random = np.random.default_rng(0)
    honest = random.dirichlet((1.0, 1.0, 1.0), size=4000)
    truth = [int(random.choice(3, p=row)) for row in honest]
    for power in (3.0, 0.5):
        changed = honest**power / (honest**power).sum(axis=1, keepdims=True)
        assert fit_temperature(changed, truth) == pytest.approx(power, rel=0.08)
        back = at_temperature(changed, power)
        assert np.allclose(back, honest) and (back.argmax(axis=1) == changed.argmax(axis=1)).all()


def test_stacked_members_say_in_one_batch_what_peft_says_one_after_the_other(
    model: Any, renderer: Renderer, tmp_path: Path
) -> None:
    """Each asked in its own words, about texts of different lengths."""
    names, labels = ("a", "b", "c"), ("负面", "正面", "一般般")
    alone = [make_adapter(model, tmp_path / name, seed=n, size=0.05) for n, name in enumerate(names)]
    parts = cast(Parts, SimpleNamespace(renderer=renderer, fit_prompt=lambda one: (tuple(one.messages), False)))
    asked = [
        [
            Question(ask(text, instruction=f"请分类{name}。", system=None), text)
            for text in ("很好", "The room was dirty.")
        ]
        for name in names
    ]
    stack = StackedAdapters(model)
    for name in names:
        stack.load(name, tmp_path / name)
    stacked = [Member(parts, model, name, stack) for name in names]
    by_peft = [Member(parts, one, "default") for one in alone]
    rows: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    found = list(answer_together(stacked, asked, labels=labels, kind="mean_probs"))
    handle.remove()
    stack.close()
    wanted = list(answer_together(by_peft, asked, labels=labels, kind="mean_probs"))
    for one, other in zip(found, wanted, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    assert set(rows) == {6}
