"""Measuring base and adapter: one loop for a run in training and for a finished one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ift_peft.data.instructions import unseen_pool
from ift_peft.data.render import TokenRenderer
from ift_peft.data.row import Row
from ift_peft.errors import RecipeError
from ift_peft.evaluate.code_metric import code_of, run_all
from ift_peft.evaluate.compare import Answers, Predictions, answer_rows, compare, predict_rows
from ift_peft.evaluate.forgetting import forgetting_scores, general_losses, general_texts
from ift_peft.evaluate.gates import check_targets
from ift_peft.evaluate.metrics import Resampling
from ift_peft.evaluate.probes import Probe, check_probes, make_probes, probe_lines, probe_scores
from ift_peft.infer.load import held_out_rows, load_model, open_parts
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir
from ift_peft.sections import Evaluation


def measure(
    model: Any,
    renderer: TokenRenderer,
    rows: Sequence[Row],
    labels: Sequence[str],
    section: Evaluation,
    *,
    adapter: bool,
    reporter: Reporter,
    what: str = "",
) -> Predictions:
    """Predictions of a PEFT model with its adapter on or off, reported as one stage.

    On the held-out rows themselves, not on a probe's (`what`), answers are generated as well where the recipe has
    metrics of them.
    """
    generating = bool(section.metrics) and not what
    if generating:
        check_metrics(section, labels, rows)
    who = f"measuring the {'adapter' if adapter else 'base'}"
    reporter.stage(f"{who} on {what}" if what else who, len(rows) * max(1, len(labels)))
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
    if not generating:
        return predictions
    reporter.stage(f"generating with the {'adapter' if adapter else 'base'}", len(rows) * section.samples)
    answers = answer_rows(
        model,
        renderer,
        rows,
        section,
        adapter=adapter,
        progress=lambda done, total: reporter.advance(done),
    )
    reporter.finish()
    if "pass_at_k" in section.metrics:
        answers = _tested(answers, [row.tests or "" for row in rows], section, reporter)
    return replace(predictions, answers=answers)


def check_metrics(section: Evaluation, labels: Sequence[str], rows: Sequence[Row]) -> None:
    """Raises `RecipeError` for metrics and targets that the task or the rows do not have."""
    check_targets(section, labels)
    if section.metrics and labels:
        raise RecipeError(
            expected="evaluation.metrics where answers are generated",
            found=f"{', '.join(section.metrics)} beside data.labels",
            fix="remove evaluation.metrics: of labels, accuracy, precision, recall, F1 and calibration are measured",
        )
    without = [row.where for row in rows if not row.tests]
    if "pass_at_k" in section.metrics and without:
        raise RecipeError(
            expected="tests in every held-out row for pass_at_k",
            found=f"none in {len(without)} of {len(rows)} rows, the first at {without[0]}",
            fix="name their column: data.columns.tests=…; or remove pass_at_k from evaluation.metrics",
        )


def _tested(answers: Answers, tests: Sequence[str], section: Evaluation, reporter: Reporter) -> Answers:
    """The answers with how many samples of each row passed its tests."""
    reporter.stage("running the programs it wrote", sum(map(len, answers.texts)))
    outcomes = run_all(
        [[code_of(text) for text in texts] for texts in answers.texts],
        tests,
        workers=max(1, (os.cpu_count() or 1) // 2),
        progress=lambda done, total: reporter.advance(done),
    )
    reporter.finish()
    for missing in sorted({guard for row in outcomes for outcome in row for guard in outcome.missing}):
        reporter.note(f"programs were run without a guard: {missing}")
    passed = [sum(outcome.passed for outcome in row) for row in outcomes]
    return replace(answers, passed=passed, pass_at=section.pass_at)


def resampling(section: Evaluation) -> Resampling:
    """How the recipe wants its intervals made."""
    return Resampling(section.bootstrap_samples, section.confidence, section.seed)


PROBE_NAMES = {"unseen": "unseen phrasings", "perturbed": "perturbed text"}


def measure_probes(
    model: Any,
    renderer: TokenRenderer,
    probes: Sequence[Probe],
    labels: Sequence[str],
    section: Evaluation,
    *,
    reporter: Reporter,
    run: RunDir | None = None,
) -> dict[str, Any]:
    """The scores of each probe by its name; with `run`, what was predicted goes into predictions-<name>.jsonl."""
    scores = {}
    for probe in probes:
        base, adapted = (
            measure(
                model,
                renderer,
                probe.rows,
                labels,
                section,
                adapter=adapter,
                reporter=reporter,
                what=PROBE_NAMES[probe.name],
            )
            for adapter in (False, True)
        )
        scores[probe.name] = probe_scores(probe, labels, base, adapted, resampling(section))
        if run is not None:
            run.write_lines(f"predictions-{probe.name}.jsonl", probe_lines(probe, labels, base, adapted))
    return scores


def measure_general(
    model: Any, tokenizer: PreTrainedTokenizerBase, section: Evaluation, *, adapter: bool, reporter: Reporter
) -> Predictions | None:
    """What a PEFT model with its adapter on or off makes of general text; None where the recipe does not ask."""
    texts = general_texts(section)
    if not texts:
        return None
    reporter.stage(f"measuring the {'adapter' if adapter else 'base'} on general text", len(texts))
    with nullcontext() if adapter else model.disable_adapter():
        predictions = general_losses(model, tokenizer, texts, progress=lambda done, total: reporter.advance(done))
    reporter.finish()
    return predictions


def forgotten(section: Evaluation, base: Predictions | None, adapter: Predictions | None) -> dict[str, Any]:
    """The entry `forgetting` of scores.json, where it was measured."""
    if base is None or adapter is None:
        return {}
    return {"forgetting": forgetting_scores(section, base, adapter, resampling(section))}


def evaluate_run(run: RunDir, *, data: Path | None, reporter: Reporter) -> dict[str, Any]:
    """The scores of base and adapter on the run's held-out rows, or on those of `data`, in the form of scores.json."""
    parts = open_parts(run)
    fitted = held_out_rows(parts, data)
    rows = fitted.rows
    section, labels = parts.recipe.evaluation, parts.labels
    check_metrics(section, labels, rows)
    unseen = unseen_pool(parts.recipe.data, section.unseen_instructions)
    check_probes(rows, section, unseen=unseen, labels=labels)
    probes = make_probes(
        rows,
        parts.askers,
        section,
        parts.renderer,
        unseen=unseen,
        protected=parts.recipe.data.protected_words,
        max_length=parts.max_length,
    )
    model, notes = load_model(parts)
    cut = [note for probe in probes for note in probe.notes]
    for note in (*fitted.fit.notes("held-out rows", parts.max_length), *cut, *notes):
        reporter.note(note)
    base, adapted = (
        measure(model, parts.renderer, rows, labels, section, adapter=adapter, reporter=reporter)
        for adapter in (False, True)
    )
    general = (
        measure_general(model, parts.tokenizer, section, adapter=adapter, reporter=reporter)
        for adapter in (False, True)
    )
    return {
        **compare(rows, labels, base, adapted, resampling(section)),
        **measure_probes(model, parts.renderer, probes, labels, section, reporter=reporter),
        **forgotten(section, *general),
    }
