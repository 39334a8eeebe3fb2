"""Probabilities of several members made into one set."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from ift_peft.infer.ensemble import together
from ift_peft.infer.temperature import at_temperature, fit_temperature
from ift_peft.stages import Kind

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
