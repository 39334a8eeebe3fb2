"""Held-out rows asked in other words, and with changed texts: how far an adapter has learnt the task itself."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ift_peft.data.augment import perturbed
from ift_peft.data.fit import fit_rows
from ift_peft.data.instructions import Asker, for_text
from ift_peft.data.render import TokenRenderer
from ift_peft.data.row import Row
from ift_peft.errors import RecipeError
from ift_peft.evaluate.compare import Predictions, prediction_lines
from ift_peft.evaluate.intervals import Floats, bootstrap_mean_ratio, percentile
from ift_peft.evaluate.metrics import Resampling
from ift_peft.sections import Evaluation, Pool, flat


@dataclass(frozen=True)
class Probe:
    """Held-out rows changed in one way.

    `of` is the number of the held-out row that each row was made of; `instruction` the number of its phrasing in
    `phrasings`, empty where the words of the question are those of training.
    """

    name: str
    rows: list[Row]
    of: list[int]
    instruction: list[int]
    phrasings: tuple[str, ...]
    notes: list[str] = field(default_factory=list)


def check_probes(rows: Sequence[Row], section: Evaluation, *, unseen: Pool | None, labels: Sequence[str]) -> None:
    """Raises `RecipeError` for probes that the rows of a recipe cannot be put to."""
    bare = [row.where for row in rows if row.text is None]
    if (unseen or section.perturbation) and bare:
        raise RecipeError(
            expected="held-out rows with a text of their own, to ask in other words or to change",
            found=f"a whole conversation at {bare[0]}",
            fix="set evaluation.unseen_instructions=null evaluation.perturbation=null, or store text and answer apart",
        )
    if section.perturbation and not labels:
        raise RecipeError(
            expected="evaluation.perturbation with data.labels",
            found="free answers, which may lose what they take from a text that is changed",
            fix="set evaluation.perturbation=null",
        )


def make_probes(
    rows: Sequence[Row],
    by_source: Sequence[Asker],
    section: Evaluation,
    renderer: TokenRenderer,
    *,
    unseen: Pool | None,
    protected: Collection[str],
    max_length: int | None,
) -> list[Probe]:
    """The probes that a recipe asks for, of rows that `check_probes` has passed; `protected` words are not changed."""
    probes = []
    if unseen:
        probes.append(_unseen(rows, by_source, section, unseen))
    if section.perturbation is not None:
        texts = perturbed(rows, section.perturbation, protected=protected)
        pairs = ((row, text, by_source[row.source]) for row, text in zip(rows, texts, strict=True))
        changed = [asker.asked(row, asker.held_out_instruction(row), text=text) for row, text, asker in pairs]
        probes.append(Probe("perturbed", changed, list(range(len(rows))), [], ()))
    for probe in probes:
        fitted = fit_rows(probe.rows, renderer, max_length=max_length, overlong="truncate")
        probe.rows[:] = fitted.rows
        probe.notes.extend(fitted.fit.notes(f"{probe.name} held-out rows", max_length))
    return probes


def _unseen(rows: Sequence[Row], by_source: Sequence[Asker], section: Evaluation, pool: Pool) -> Probe:
    phrasings = flat(pool)
    chosen = list(range(len(rows)))
    if section.max_unseen_rows is not None and section.max_unseen_rows < len(rows):
        chosen = sorted(random.Random(section.seed).sample(chosen, section.max_unseen_rows))
    triples = [
        (number, phrasings.index(phrasing)) for number in chosen for phrasing in for_text(pool, rows[number].text or "")
    ]
    asked = [by_source[rows[number].source].asked(rows[number], phrasings[which]) for number, which in triples]
    return Probe("unseen", asked, [number for number, _ in triples], [which for _, which in triples], phrasings)


def probe_scores(
    probe: Probe, labels: Sequence[str], base: Predictions, adapter: Predictions, resampling: Resampling
) -> dict[str, Any]:
    """accuracy (or loss) of base and adapter, and what changed, with intervals by a bootstrap over held-out rows.

    A row that was asked in several phrasings is one draw with all of them. For phrasings also each one's score, and
    the spread: the best phrasing's minus the worst's.
    """
    metric = "accuracy" if labels else "loss"
    values = {name: _values(probe, labels, predictions) for name, predictions in (("base", base), ("adapter", adapter))}
    scores: dict[str, Any] = {"rows": len(set(probe.of)), "asked": len(probe.rows)}
    change = (values["adapter"][0] - values["base"][0], values["base"][1])
    for name, (numerators, denominators) in (*values.items(), ("change", change)):
        value, drawn = bootstrap_mean_ratio(
            *_by_row(probe, numerators, denominators), samples=resampling.samples, seed=resampling.seed
        )
        scores[name] = {metric: percentile(value, drawn, confidence=resampling.confidence).to_json()}
    if probe.phrasings:
        which = np.asarray(probe.instruction)
        each: dict[str, list[float]] = {
            name: [
                float(numerators[which == number].sum() / denominators[which == number].sum())
                for number in range(len(probe.phrasings))
                if (which == number).any()
            ]
            for name, (numerators, denominators) in values.items()
        }
        asked = [phrasing for number, phrasing in enumerate(probe.phrasings) if (which == number).any()]
        scores["phrasings"] = [
            {"instruction": phrasing, **{name: round(each[name][at], 6) for name in each}}
            for at, phrasing in enumerate(asked)
        ]
        scores["spread"] = {name: round(max(found) - min(found), 6) for name, found in each.items()}
    return scores


def _values(probe: Probe, labels: Sequence[str], predictions: Predictions) -> tuple[Floats, Floats]:
    """Numerators and denominators of the metric for each asked row: hits of one, or nats of tokens."""
    if labels:
        truth = [labels.index(row.answer) for row in probe.rows]
        return np.asarray(np.equal(truth, predictions.chosen), dtype=np.float64), np.ones(len(truth))
    assert predictions.log_probabilities is not None and predictions.tokens is not None
    return -predictions.log_probabilities, predictions.tokens


def _by_row(probe: Probe, numerators: Floats, denominators: Floats) -> tuple[Floats, Floats]:
    _, number = np.unique(probe.of, return_inverse=True)
    sums = (np.bincount(number, weights=values) for values in (numerators, denominators))
    top, bottom = (np.asarray(values, dtype=np.float64) for values in sums)
    return top, bottom


def probe_lines(probe: Probe, labels: Sequence[str], base: Predictions, adapter: Predictions) -> list[dict[str, Any]]:
    """One object for each asked row, as in predictions.jsonl; `row` is the held-out row, `instruction` the phrasing."""
    lines = prediction_lines(probe.rows, labels, base, adapter)
    for line, number in zip(lines, probe.of, strict=True):
        line["row"] = number
    for line, which in zip(lines, probe.instruction, strict=bool(probe.instruction)):
        line["instruction"] = which
    return lines
