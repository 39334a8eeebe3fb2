"""Probabilities made as sure as they are right: one temperature, fitted on rows that nothing is measured on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ift_peft.data.fit import fit_rows
from ift_peft.data.rows import from_saved
from ift_peft.errors import RunError, raise_all
from ift_peft.infer.ensemble import Member, answer_together
from ift_peft.infer.load import Question
from ift_peft.stages import Kind

Floats = NDArray[np.float64]
VALIDATION = "validation.jsonl"
TRIED = np.geomspace(0.05, 20, 601)  # a percent apart; 1 is among them only nearly


def fit_temperature(probabilities: Floats, truth: Sequence[int]) -> float:
    """Of `TRIED`, the temperature at which `truth` is likeliest (arXiv:1706.04599).

    `probabilities` has shape (rows, labels), `truth` the number of the right label of each row.
    """
    at = np.arange(len(truth)), np.array(truth)
    losses = [
        -np.log(at_temperature(probabilities, float(one))[at] + np.finfo(np.float64).tiny).mean() for one in TRIED
    ]
    return float(TRIED[int(np.argmin(losses))])


def at_temperature(probabilities: Floats, temperature: float) -> Floats:
    """The softmax of the logarithms divided by `temperature`; above 1 less sure, the order of labels stays."""
    logs = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny)) / temperature
    powers = np.exp(logs - logs.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def ensemble_temperature(members: Sequence[Member], labels: Sequence[str], kind: Kind) -> tuple[float, int]:
    """The temperature of an ensemble by the rows that all runs set aside to validate on, and how many these are.

    Raises `RunError` or `Faults` where a run has none, or not the same as the others.
    """
    lacking = [member.parts.run for member in members if not (member.parts.run.path / VALIDATION).is_file()]
    raise_all(
        [
            RunError(
                expected="validation rows in every run, to calibrate by",
                found=f"none in {'/'.join(run.path.parts[-2:])}",
                fix="train it with the section validation, or leave out --calibrate",
            )
            for run in lacking
        ]
    )
    questions, truths = [], []
    for member in members:
        parts = member.parts
        rows = [from_saved(line) for line in parts.run.read_lines(VALIDATION)]
        rows = fit_rows(rows, parts.renderer, max_length=parts.max_length, overlong=parts.recipe.data.overlong).rows
        questions.append([Question(row.prompt, row.text) for row in rows])
        truths.append([row.answer for row in rows])
    if any(truth != truths[0] for truth in truths):
        raise RunError(
            expected="the same validation rows in every run",
            found="others, or other answers",
            fix="train the runs with one section validation, or leave out --calibrate",
        )
    answers = list(answer_together(members, questions, labels=labels, kind=kind))
    table = np.array([[(answer.probabilities or {})[label] for label in labels] for answer in answers])
    return fit_temperature(table, [list(labels).index(truth) for truth in truths[0]]), len(answers)
