"""Base against adapter, whole: one order of measuring for a run in training and for a finished one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ift_peft.data.instructions import unseen_pool
from ift_peft.data.render import TokenRenderer
from ift_peft.data.row import Row
from ift_peft.errors import RunError
from ift_peft.evaluate.by_source import Part, parts_of
from ift_peft.evaluate.compare import Predictions, compare, prediction_lines
from ift_peft.evaluate.gates import all_gates
from ift_peft.evaluate.measure import (
    check_evaluation,
    forgotten,
    measure,
    measure_general,
    measure_probes,
    measure_safety,
    resampling,
    safety,
)
from ift_peft.evaluate.probes import Probe, make_probes
from ift_peft.evaluate.safety import Replies
from ift_peft.infer.load import held_out_rows, load_model, open_parts
from ift_peft.recipe import Recipe
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir


@dataclass(frozen=True)
class Measured:
    """What the model, with its adapter on or off, made of all that the recipe wants measured before and after."""

    rows: Predictions
    general: Predictions | None
    replies: Replies | None


@dataclass(frozen=True)
class Measuring:
    """A PEFT model, and the held-out rows and probes of a recipe that it is measured on."""

    model: Any
    renderer: TokenRenderer
    recipe: Recipe
    rows: Sequence[Row]
    probes: Sequence[Probe]
    reporter: Reporter

    @cached_property
    def tasks(self) -> list[Part]:
        """The tasks of a mix, none where there is but one."""
        return parts_of(self.recipe.data, self.recipe.evaluation, self.rows)

    @property
    def all_labels(self) -> tuple[str, ...]:
        """Those of the task, or of every task of a mix."""
        return tuple(dict.fromkeys(word for part, _ in self.recipe.data.by_source() for word in part.label_words))

    def of(self, *, adapter: bool) -> Measured:
        """Measure the model with its adapter on or off."""
        model, renderer, section, reporter = self.model, self.renderer, self.recipe.evaluation, self.reporter
        labels = self.recipe.data.label_words
        return Measured(
            measure(model, renderer, self.rows, labels, section, adapter=adapter, reporter=reporter, parts=self.tasks),
            measure_general(model, renderer.tokenizer, section, adapter=adapter, reporter=reporter),
            measure_safety(model, renderer, self.all_labels, section, adapter=adapter, reporter=reporter),
        )

    def scores(self, base: Measured, adapter: Measured, *, run: RunDir | None = None) -> dict[str, Any]:
        """The content of scores.json. Probes are measured now; with `run`, what was predicted goes into its folder."""
        section, labels = self.recipe.evaluation, self.recipe.data.label_words
        scores = {
            **compare(self.rows, labels, base.rows, adapter.rows, resampling(section), parts=self.tasks),
            **measure_probes(self.model, self.renderer, self.probes, labels, section, reporter=self.reporter, run=run),
            **forgotten(section, base.general, adapter.general),
            **safety(section, self.all_labels, base.replies, adapter.replies, run=run),
        }
        if run is not None:
            lines = prediction_lines(self.rows, labels, base.rows, adapter.rows, parts=self.tasks)
            run.write_lines("predictions.jsonl", lines)
        return {**scores, "gates": all_gates(section, scores)}


def evaluate_run(
    run: RunDir, *, data: Path | None, reporter: Reporter, source: str | None = None, keep: bool = False
) -> dict[str, Any]:
    """The scores of base and adapter on the run's held-out rows, or on those of `data`, in the form of scores.json.

    Rows of `data` are read, asked and, in a mix, measured as those of `source`. With `keep`, what was predicted goes
    into the run's folder. Raises `RunError` where there is none of that name.
    """
    parts = open_parts(run)
    if source is not None and data is None:
        raise RunError(expected="--source with --data", found="--source alone", fix="name a file of rows with --data")
    fitted = held_out_rows(parts if source is None else parts.as_source(source), data)
    recipe, rows = parts.recipe, fitted.rows
    unseen = unseen_pool(recipe.data, recipe.evaluation.unseen_instructions)
    check_evaluation(recipe.data, recipe.evaluation, rows, unseen=unseen)
    probes = make_probes(
        rows,
        parts.askers,
        recipe.evaluation,
        parts.renderer,
        unseen=unseen,
        protected=recipe.data.protected_words,
        max_length=parts.max_length,
    )
    model, notes = load_model(parts)
    cut = [note for probe in probes for note in probe.notes]
    for note in (*fitted.fit.notes("held-out rows", parts.max_length), *cut, *notes):
        reporter.note(note)
    measuring = Measuring(model, parts.renderer, recipe, rows, probes, reporter)
    return measuring.scores(measuring.of(adapter=False), measuring.of(adapter=True), run=run if keep else None)
