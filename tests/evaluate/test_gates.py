"""Targets: met at the worse end of the interval, refused where the task has no such metric."""

from __future__ import annotations

from typing import Any

import pytest

from ift_peft.errors import Faults, GateMissed, RecipeError, raise_all
from ift_peft.evaluate.gates import check_targets, missed, target_gates
from ift_peft.sections import Evaluation


def scores(**parts: tuple[float, float, float]) -> dict[str, Any]:
    return {"adapter": {name: dict(zip(("value", "low", "high"), part, strict=True)) for name, part in parts.items()}}


def test_a_target_is_met_by_the_worse_end_and_not_by_the_value() -> None:
    section = Evaluation(target={"accuracy": 0.8, "loss": 1.0})
    found = scores(accuracy=(0.85, 0.79, 0.9), loss=(0.8, 0.7, 1.0))
    assert [gate["met"] for gate in target_gates(section, found)] == [False, True]
    better = scores(accuracy=(0.85, 0.8, 0.9), loss=(0.8, 0.7, 1.01))
    assert [gate["met"] for gate in target_gates(section, better)] == [True, False]


def test_every_missed_gate_is_told_with_exit_code_8() -> None:
    section = Evaluation(target={"accuracy": 0.9, "f1": 0.9})
    found = scores(accuracy=(0.85, 0.8, 0.9), f1=(0.85, 0.8, 0.9))
    found["gates"] = target_gates(section, found)
    with pytest.raises(Faults, match=r"accuracy at least 0\.9[\s\S]*f1 at least 0\.9") as error:
        raise_all(missed(found))
    assert error.value.exit_code == GateMissed.exit_code == 8


@pytest.mark.parametrize(
    ("section", "labels"),
    [
        (Evaluation(target={"bleu": 0.2}), ["yes", "no"]),
        (Evaluation(target={"accuracy": 0.2}), []),
        (Evaluation(target={"rouge": 0.2}, metrics=("rouge",)), []),
        (Evaluation(target={"pass@2": 0.2}, metrics=("pass_at_k",)), []),
    ],
)
def test_a_target_of_another_tasks_metric_is_refused(section: Evaluation, labels: list[str]) -> None:
    with pytest.raises(RecipeError, match=next(iter(section.target))):
        check_targets(section, labels)


def test_targets_of_chosen_metrics_are_taken() -> None:
    metrics = ("rouge", "pass_at_k", "f1")
    check_targets(Evaluation(target={"rougeL": 0.1, "pass@1": 0.1, "f1": 0.2, "loss": 3.0}, metrics=metrics), [])
