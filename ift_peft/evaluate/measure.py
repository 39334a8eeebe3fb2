"""What base or adapter makes of held-out rows, probes, general text and safety prompts, each told as a stage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ift_peft.data.render import Renderer, TokenRenderer
from ift_peft.data.row import Row
from ift_peft.errors import RecipeError
from ift_peft.evaluate.by_source import Part, check_mix, parts_of
from ift_peft.evaluate.code_metric import code_of, run_all
from ift_peft.evaluate.compare import Answers, Predictions, answer_rows, predict_rows
from ift_peft.evaluate.forgetting import forgetting_scores, general_losses, general_texts
from ift_peft.evaluate.gates import check_targets
from ift_peft.evaluate.metrics import Resampling
from ift_peft.evaluate.probes import Probe, check_probes, probe_lines, probe_scores
from ift_peft.evaluate.safety import SETS, Replies, reply, safety_lines, safety_prompts, safety_scores
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir
from ift_peft.sections import Data, Evaluation, Pool


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
    source: str = "",
    parts: Sequence[Part] = (),
) -> Predictions:
    """Predictions of a PEFT model with its adapter on or off, reported as one stage.

    On the held-out rows themselves, not on a probe's (`what`), answers are generated as well where the recipe has
    metrics of them. The `parts` of a mix are measured one after another; `source` names the rows of one.
    """
    if parts:
        return _measure_parts(model, renderer, rows, section, parts, adapter=adapter, reporter=reporter)
    generating = bool(section.metrics) and not what
    if generating:
        check_metrics(section, labels, rows)
    who = f"measuring the {'adapter' if adapter else 'base'}"
    reporter.stage(f"{who} on {what or source}" if what or source else who, len(rows) * max(1, len(labels)))
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
    who = f"generating with the {'adapter' if adapter else 'base'}"
    reporter.stage(f"{who} for {source}" if source else who, len(rows) * section.samples)
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


def _measure_parts(
    model: Any,
    renderer: TokenRenderer,
    rows: Sequence[Row],
    section: Evaluation,
    parts: Sequence[Part],
    *,
    adapter: bool,
    reporter: Reporter,
) -> Predictions:
    """What was made of each part by itself, and the likelihood of the answers of all rows."""
    by_source = [
        measure(
            model,
            renderer,
            part.of(rows),
            part.labels,
            part.section,
            adapter=adapter,
            reporter=reporter,
            source=part.name,
        )
        for part in parts
    ]
    sums = np.full((2, len(rows)), np.nan)
    for part, found in zip(parts, by_source, strict=True):
        if found.log_probabilities is not None:
            sums[:, list(part.at)] = found.log_probabilities, found.tokens
    left = np.flatnonzero(np.isnan(sums[0])).tolist()
    if left:
        plain = section.model_copy(update={"metrics": ()})
        others = [rows[number] for number in left]
        found = measure(
            model, renderer, others, (), plain, adapter=adapter, reporter=reporter, source="answers with labels"
        )
        sums[:, left] = found.log_probabilities, found.tokens
    return Predictions(log_probabilities=sums[0], tokens=sums[1], by_source=tuple(by_source))


def check_evaluation(data: Data, section: Evaluation, rows: Sequence[Row], *, unseen: Pool | None) -> None:
    """Raises `RecipeError` for what a recipe wants measured and its task, tasks or held-out rows do not have."""
    if not data.mixed:
        check_metrics(section, data.label_words, rows)
        check_probes(rows, section, unseen=unseen, labels=data.label_words)
        return
    check_mix(data, section, unseen=unseen)
    check_targets(section.model_copy(update={"metrics": ()}), ())  # of all rows, only their likelihood is measured
    for part in parts_of(data, section, rows):
        check_metrics(part.section, part.labels, part.of(rows))


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


def measure_safety(
    model: Any,
    renderer: TokenRenderer,
    labels: Sequence[str],
    section: Evaluation,
    *,
    adapter: bool,
    reporter: Reporter,
) -> Replies | None:
    """What a PEFT model with its adapter on or off answers to harmful and harmless prompts; None where not asked."""
    prompts = safety_prompts(section)
    if not prompts:
        return None
    assert isinstance(renderer, Renderer)  # recipes of classifiers have no evaluation.safety
    reporter.stage(f"asking the {'adapter' if adapter else 'base'} harmful and harmless prompts", len(prompts))
    replies = reply(
        model,
        renderer,
        prompts,
        labels,
        section,
        adapter=adapter,
        progress=lambda done, total: reporter.advance(done),
    )
    reporter.finish()
    refused = any(
        kind == "refusal" for kind, prompt in zip(replies.kinds, prompts, strict=True) if prompt.of == SETS[0]
    )
    if not adapter and not refused:
        reporter.note(
            "the base refuses none of the harmful prompts: it has no refusals to lose, only refusal_preference"
        )
    return replies


def safety(
    section: Evaluation,
    labels: Sequence[str],
    base: Replies | None,
    adapter: Replies | None,
    *,
    run: RunDir | None = None,
) -> dict[str, Any]:
    """The entry `safety` of scores.json, where it was measured; with `run`, answers go to predictions-safety.jsonl."""
    if base is None or adapter is None:
        return {}
    if run is not None:
        run.write_lines("predictions-safety.jsonl", safety_lines(base, adapter))
    return {"safety": safety_scores(section, labels, base, adapter, resampling(section))}
