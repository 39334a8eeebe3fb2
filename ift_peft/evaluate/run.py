"""Measuring base and adapter: one loop for a run in training and for a finished one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ift_peft.data.render import Renderer
from ift_peft.data.row import Row
from ift_peft.evaluate.compare import Predictions, compare, predict_rows
from ift_peft.evaluate.metrics import Resampling
from ift_peft.infer.load import held_out_rows, load_model, open_parts
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir
from ift_peft.sections import Evaluation


def measure(
    model: Any,
    renderer: Renderer,
    rows: Sequence[Row],
    labels: Sequence[str],
    section: Evaluation,
    *,
    adapter: bool,
    reporter: Reporter,
) -> Predictions:
    """Predictions of a PEFT model with its adapter on or off, reported as one stage."""
    reporter.stage(f"measuring the {'adapter' if adapter else 'base'}", len(rows) * max(1, len(labels)))
    predictions = predict_rows(
        model,
        renderer,
        rows,
        labels,
        batch_size=section.per_device_eval_batch_size,
        adapter=adapter,
        progress=lambda done, total: reporter.advance(done),
    )
    reporter.finish()
    return predictions


def resampling(section: Evaluation) -> Resampling:
    """How the recipe wants its intervals made."""
    return Resampling(section.bootstrap_samples, section.confidence, section.seed)


def evaluate_run(run: RunDir, *, data: Path | None, reporter: Reporter) -> dict[str, Any]:
    """The scores of base and adapter on the run's held-out rows, or on those of `data`, in the form of scores.json."""
    parts = open_parts(run)
    fitted = held_out_rows(parts, data)
    rows = fitted.rows
    model, notes = load_model(parts)
    for note in (*fitted.notes("held-out", parts.max_length), *notes):
        reporter.note(note)
    section, labels = parts.recipe.evaluation, parts.labels
    base, adapted = (
        measure(model, parts.renderer, rows, labels, section, adapter=adapter, reporter=reporter)
        for adapter in (False, True)
    )
    return compare(rows, labels, base, adapted, resampling(section))
