"""Base against adapter on held-out rows: predictions of each, and the scores that go into scores.json."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from ift_peft.data.render import Renderer, TokenRenderer
from ift_peft.data.row import Row
from ift_peft.evaluate import metrics
from ift_peft.evaluate.calibration import calibration_scores
from ift_peft.evaluate.code_metric import pass_at_k
from ift_peft.evaluate.intervals import Floats
from ift_peft.evaluate.metrics import Resampling
from ift_peft.evaluate.rowwise import compared, mean, with_ones
from ift_peft.evaluate.text_metrics import text_scores
from ift_peft.infer.batches import Progress
from ift_peft.infer.generation import generate_all
from ift_peft.infer.likelihood import answer_likelihoods, label_probabilities
from ift_peft.sections import Evaluation


@dataclass(frozen=True)
class Answers:
    """Generated answers to the held-out rows, and what they are to be scored by.

    `texts` holds the samples of each row, `passed` how many of them passed the row's tests, where there are tests.
    """

    texts: list[list[str]]
    metrics: tuple[str, ...]
    passed: list[int] | None = None
    pass_at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Predictions:
    """What one model made of the held-out rows.

    Classification: `probabilities` of shape (rows, labels). Otherwise: `log_probabilities` of the reference answers and
    their `tokens`, both of shape (rows,), and the model's own `answers` where the recipe asks for any.
    """

    probabilities: Floats | None = None
    log_probabilities: Floats | None = None
    tokens: Floats | None = None
    answers: Answers | None = None

    @property
    def chosen(self) -> list[int]:
        assert self.probabilities is not None
        return [int(index) for index in self.probabilities.argmax(axis=1)]


def predict_rows(
    model: Any,
    renderer: TokenRenderer,
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    batch_size: int,
    adapter: bool,
    progress: Progress | None = None,
) -> Predictions:
    """Predictions of a PEFT model with its adapter on or off. Without `labels`, the likelihood of the answers."""
    with nullcontext() if adapter else model.disable_adapter():
        if labels:
            prompts = [row.prompt for row in rows]
            return Predictions(
                probabilities=label_probabilities(
                    model, renderer, prompts, labels, batch_size=batch_size, progress=progress
                )
            )
        likelihoods = answer_likelihoods(
            model,
            renderer.render([row.messages for row in rows]),
            batch_size=batch_size,
            pad_token_id=renderer.tokenizer.pad_token_id,
            progress=progress,
        )
    return Predictions(
        log_probabilities=np.array([one.log_probability for one in likelihoods]),
        tokens=np.array([one.tokens for one in likelihoods], dtype=np.float64),
    )


def answer_rows(
    model: Any,
    renderer: TokenRenderer,
    rows: Sequence[Row],
    section: Evaluation,
    *,
    adapter: bool,
    progress: Progress | None = None,
) -> Answers:
    """Answers that a PEFT model, with its adapter on or off, gives to the rows' questions."""
    assert isinstance(renderer, Renderer)  # check_metrics refuses metrics of answers beside labels
    with nullcontext() if adapter else model.disable_adapter():
        texts = generate_all(
            model,
            renderer,
            [row.prompt for row in rows],
            max_new_tokens=section.max_new_tokens,
            batch_size=section.per_device_eval_batch_size,
            progress=progress,
            samples=section.samples,
            temperature=section.temperature,
            seed=section.seed,
        )
    return Answers(texts, section.metrics)


def compare(
    rows: Sequence[Row], labels: Sequence[str], base: Predictions, adapter: Predictions, resampling: Resampling
) -> dict[str, Any]:
    """The content of scores.json: `base`, `adapter` and `change` (adapter minus base), each value with its interval."""
    scores: dict[str, Any] = {"rows": len(rows), "intervals": resampling.describe()}
    if labels:
        truth = [labels.index(row.answer) for row in rows]
        for name, predictions in (("base", base), ("adapter", adapter)):
            matrix = metrics.confusion(truth, predictions.chosen, len(labels))
            scores[name] = metrics.to_json(metrics.classification_metrics(matrix, resampling))
            scores.setdefault("confusion", {"labels": list(labels)})[name] = matrix.tolist()
            scores.setdefault("per_class", {})[name] = metrics.per_class(matrix, labels)
        change = metrics.classification_change(truth, base.chosen, adapter.chosen, len(labels), resampling)
        assert base.probabilities is not None and adapter.probabilities is not None
        scores["calibration"] = calibration_scores(truth, base.probabilities, adapter.probabilities, resampling)
    else:
        for name, predictions in (("base", base), ("adapter", adapter)):
            assert predictions.log_probabilities is not None and predictions.tokens is not None
            scores[name] = metrics.to_json(
                metrics.language_metrics(predictions.log_probabilities, predictions.tokens, resampling)
            )
        assert base.log_probabilities is not None and adapter.log_probabilities is not None and base.tokens is not None
        change = metrics.language_change(base.log_probabilities, adapter.log_probabilities, base.tokens, resampling)
    scores["change"] = metrics.to_json(change)
    if base.answers is not None and adapter.answers is not None:
        _add_answer_scores(scores, rows, base.answers, adapter.answers, resampling)
    return scores


def _add_answer_scores(
    scores: dict[str, Any], rows: Sequence[Row], base: Answers, adapter: Answers, resampling: Resampling
) -> None:
    """The metrics of generated answers, beside the others in `base`, `adapter` and `change`."""
    found = text_scores(
        [row.answer for row in rows],
        [samples[0] for samples in base.texts],
        [samples[0] for samples in adapter.texts],
        names=adapter.metrics,
        resampling=resampling,
    )
    for who, part in (("base", found.base), ("adapter", found.adapter), ("change", found.change)):
        scores[who] |= metrics.to_json(part)
    if found.signatures:
        scores["signatures"] = found.signatures
    if base.passed is None or adapter.passed is None:
        return
    for k in adapter.pass_at:
        by_row = [
            [pass_at_k(len(texts), passed, k) for texts, passed in zip(one.texts, one.passed or (), strict=True)]
            for one in (base, adapter)
        ]
        before, after = (with_ones(np.array(values)) for values in by_row)
        both = compared(before, after, score=mean, resampling=resampling)
        for who in ("base", "adapter", "change"):
            scores[who][f"pass@{k}"] = getattr(both, who).to_json()


def prediction_lines(
    rows: Sequence[Row], labels: Sequence[str], base: Predictions, adapter: Predictions
) -> list[dict[str, Any]]:
    """One object for each row: where it came from, its reference, and what base and adapter made of it."""
    lines: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        line: dict[str, Any] = {"row": index, "answer": row.answer}
        for name, predictions in (("base", base), ("adapter", adapter)):
            if predictions.probabilities is not None:
                line[name] = {
                    label: round(float(p), 6) for label, p in zip(labels, predictions.probabilities[index], strict=True)
                }
            elif predictions.log_probabilities is not None:
                assert predictions.tokens is not None
                log_probability = round(float(predictions.log_probabilities[index]), 6)
                line[name] = {"log_probability": log_probability, "tokens": int(predictions.tokens[index])}
            if predictions.answers is not None:
                line[name] |= _answer_line(predictions.answers, index)
        lines.append(line)
    return lines


def _answer_line(answers: Answers, index: int) -> dict[str, Any]:
    texts = answers.texts[index]
    line: dict[str, Any] = {"text": texts[0]} if len(texts) == 1 else {"texts": texts}
    return line if answers.passed is None else {**line, "passed": answers.passed[index]}
