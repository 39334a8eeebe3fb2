"""An ensemble against each of its members, on rows that all of them are asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ift_peft.data.fit import Fitted
from ift_peft.data.row import Row
from ift_peft.errors import RunError
from ift_peft.evaluate import metrics
from ift_peft.evaluate.arms import require_same_rows, short
from ift_peft.evaluate.calibration import calibration_scores
from ift_peft.evaluate.compare import predict_rows
from ift_peft.evaluate.intervals import Floats
from ift_peft.evaluate.measure import resampling
from ift_peft.evaluate.metrics import Resampling
from ift_peft.infer.ensemble import Member, check_members, open_members, together
from ift_peft.infer.load import Parts, held_out_rows, open_parts
from ift_peft.infer.temperature import at_temperature, ensemble_temperature
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir
from ift_peft.stages import Kind

CALIBRATION = ("ece", "brier", "nll")


def evaluate_ensemble(
    runs: Sequence[RunDir],
    kind: Kind,
    *,
    data: Path | None,
    reporter: Reporter,
    source: str | None = None,
    calibrate: bool = False,
) -> dict[str, Any]:
    """Scores of each run, of all together, and of the changes from each to that, paired, with a verdict.

    The rows are those that all runs hold out, or those of `data`, which each reads and asks by its own recipe, of a
    mix as `source` does. With `calibrate` the ensemble has a temperature, fitted on validation rows. Raises
    `RunError` or `Faults` where labels or rows are not the same.
    """
    parts = [open_parts(run) for run in runs]
    if source is not None:
        parts = [one.as_source(source) if one.recipe.data.mixed else one for one in parts]
    labels = check_members(parts)
    if data is None:
        if any(one.recipe.data.mixed for one in parts):
            raise RunError(
                expected="--data with a run on a mix of tasks, whose held-out rows are of all of them",
                found="none",
                fix="name a file of rows: --data FILE",
            )
        require_same_rows(runs)
    fitted, answers = _same_rows(parts, data)
    members, notes = open_members(parts)
    for one, own in zip(fitted, parts, strict=True):
        notes += one.fit.notes(f"rows for {own.run.path.parent.name}", own.max_length)
    for note in notes:
        reporter.note(note)
    found = {
        name: _probabilities(member, own.rows, labels, name, reporter)
        for member, own, name in zip(members, fitted, member_names(runs), strict=True)
    }
    truth = [labels.index(answer) for answer in answers]
    section = resampling(parts[0].recipe.evaluation)
    temperature, fitted_on = ensemble_temperature(members, labels, kind) if calibrate else (1.0, 0)
    if calibrate:
        reporter.note(f"temperature {temperature:.3f}, by {fitted_on} validation rows")
    return ensemble_scores(truth, labels, found, kind, section, temperature=temperature)


def _same_rows(parts: Sequence[Parts], data: Path | None) -> tuple[list[Fitted], list[str]]:
    """The rows of each run, and their answers. Raises `RunError` where one has others."""
    fitted = [held_out_rows(one, data) for one in parts]
    truths = [[(row.answer, row.where if data else "") for row in one.rows] for one in fitted]
    if any(truth != truths[0] for truth in truths):
        raise RunError(
            expected="the same rows for every run",
            found="rows that some leave out, or read another answer from",
            fix="data.overlong=truncate keeps them; check data.labels of the runs",
        )
    return fitted, [answer for answer, _ in truths[0]]


def _probabilities(member: Member, rows: Sequence[Row], labels: Sequence[str], name: str, reporter: Reporter) -> Floats:
    """Of each of `labels`, in this order; shape (rows, labels)."""
    reporter.stage(f"measuring {name}", len(rows) * len(labels))
    predicted = predict_rows(
        member.activate(),
        member.parts.renderer,
        rows,
        member.parts.labels,
        batch_size=member.parts.recipe.evaluation.per_device_eval_batch_size,
        adapter=True,
        progress=lambda done, total: reporter.advance(done),
    )
    reporter.finish()
    assert predicted.probabilities is not None
    ordered: Floats = predicted.probabilities[:, [member.parts.labels.index(label) for label in labels]]
    return ordered


def member_names(runs: Sequence[RunDir]) -> list[str]:
    """The recipe's name of each run, with its time and id where several share one, numbered where one comes twice."""
    names = [run.path.parent.name for run in runs]
    told = [short(run) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]
    return [f"{name} ({number})" if told.count(name) > 1 else name for number, name in enumerate(told, start=1)]


def ensemble_scores(
    truth: Sequence[int],
    labels: Sequence[str],
    members: dict[str, Floats],
    kind: Kind,
    section: Resampling,
    *,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """`members`, `ensemble` and `change` (ensemble minus member) with intervals, the `best` member, and a verdict.

    `members` has the probabilities of each, shape (rows, labels). The best member is best on these same rows, so a
    difference from it is, if anything, too small.
    """
    ensemble = at_temperature(together(np.stack(list(members.values())), kind), temperature)
    chosen, number = ensemble.argmax(axis=1).tolist(), len(labels)
    scores: dict[str, Any] = {"rows": len(truth), "labels": list(labels), "kind": kind, "members": {}, "change": {}}
    scores |= {"temperature": round(temperature, 6)} if temperature != 1.0 else {}
    for name, own in members.items():
        alone = own.argmax(axis=1).tolist()
        calibration = calibration_scores(truth, own, ensemble, section)
        matrix = metrics.confusion(truth, alone, number)
        change = metrics.classification_change(truth, alone, chosen, number, section)
        scores["members"][name] = metrics.to_json(metrics.classification_metrics(matrix, section)) | _rates(
            calibration["base"]
        )
        scores["change"][name] = metrics.to_json(change) | _rates(calibration["change"])
        ensembled = _rates(calibration["adapter"])
    matrix = metrics.confusion(truth, chosen, number)
    scores["ensemble"] = metrics.to_json(metrics.classification_metrics(matrix, section)) | ensembled
    best = max(
        members,
        key=lambda name: (
            scores["members"][name]["accuracy"]["value"],
            -scores["members"][name]["nll"]["value"],
        ),
    )
    scores |= {"best": best, "verdict": _verdict(best, scores["change"][best]), "intervals": section.describe()}
    return scores


def _rates(calibration: dict[str, Any]) -> dict[str, Any]:
    return {name: calibration[name] for name in CALIBRATION}


def _verdict(best: str, change: dict[str, dict[str, float]]) -> str:
    accuracy = change["accuracy"]
    told = f"{accuracy['value']:+.3f} [{accuracy['low']:+.3f}, {accuracy['high']:+.3f}]"
    if accuracy["low"] > 0:
        return f"the ensemble is better than its best member, {best}: accuracy {told}"
    if accuracy["high"] < 0:
        return f"the ensemble is worse than its best member, {best}: accuracy {told}"
    return f"not shown to be better than its best member, {best}: accuracy {told}, an interval that holds 0"
