"""Measuring a finished run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ift_peft.evaluate.compare import compare, predict_rows
from ift_peft.evaluate.metrics import Resampling
from ift_peft.infer.load import held_out_rows, load_model, open_parts
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir


def evaluate_run(run: RunDir, *, data: Path | None, reporter: Reporter) -> dict[str, Any]:
    """The scores of base and adapter on the run's held-out rows, or on those of `data`, in the form of scores.json."""
    parts = open_parts(run)
    fitted = held_out_rows(parts, data)
    rows = fitted.rows
    model, notes = load_model(parts)
    for note in (*fitted.notes("held-out", parts.max_length), *notes):
        reporter.note(note)
    measured = []
    section = parts.recipe.evaluation
    for name, adapter in (("base", False), ("adapter", True)):
        reporter.stage(f"measuring the {name}", len(rows) * max(1, len(parts.labels)))
        measured.append(
            predict_rows(
                model,
                parts.renderer,
                rows,
                parts.labels,
                batch_size=section.per_device_eval_batch_size,
                adapter=adapter,
                progress=lambda done, total: reporter.advance(done),
            )
        )
        reporter.finish()
    resampling = Resampling(section.bootstrap_samples, section.confidence, section.seed)
    return compare(rows, parts.labels, measured[0], measured[1], resampling)
