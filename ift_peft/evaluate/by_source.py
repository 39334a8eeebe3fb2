"""A mix: sources that are tasks of their own, each of whose held-out rows are measured as that task alone would be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ift_peft.data.row import Row
from ift_peft.errors import RecipeError, raise_all
from ift_peft.sections import Data, Evaluation, Pool


@dataclass(frozen=True)
class Part:
    """The held-out rows of one source: `at` are their numbers among all, `section` says how they alone are measured."""

    name: str
    labels: tuple[str, ...]
    section: Evaluation
    at: tuple[int, ...]

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """Its own out of all held-out rows."""
        return [rows[number] for number in self.at]


def parts_of(data: Data, section: Evaluation, rows: Sequence[Row]) -> list[Part]:
    """The parts of a mix, in the order of its sources, without those of which nothing is held out; else none."""
    if not data.mixed:
        return []
    parts = []
    for number, (source, (task, _)) in enumerate(zip(data.sources, data.by_source(), strict=True)):
        at = tuple(index for index, row in enumerate(rows) if row.source == number)
        metrics = () if task.label_words else section.metrics if source.metrics is None else source.metrics
        own = section.model_copy(update={"metrics": metrics, "target": {}})
        if at:
            parts.append(Part(source.called, task.label_words, own, at))
    return parts


def check_mix(data: Data, section: Evaluation, *, unseen: Pool | None) -> None:
    """Raises a `RecipeError` for every setting that asks of several tasks what only one can be asked."""
    refused = {
        "evaluation.unseen_instructions, or hold_out": unseen is not None,
        "evaluation.perturbation": section.perturbation is not None,
    }
    faults = [
        RecipeError(
            expected=f"no {setting} for a mix: it is measured in other words, or on changed texts, of one task",
            found=f"the tasks {', '.join(data.source_names)}",
            fix="set it to null; train a recipe of one of the tasks to measure it there",
        )
        for setting, found in refused.items()
        if found
    ]
    if section.metrics and all(task.label_words for task, _ in data.by_source()):
        faults.append(
            RecipeError(
                expected="evaluation.metrics where answers are generated",
                found=f"{', '.join(section.metrics)}, and labels in every source",
                fix="remove evaluation.metrics",
            )
        )
    raise_all(faults)
