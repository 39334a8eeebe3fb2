"""Base against adapter on held-out rows: predictions of each, and the scores that go into scores.json."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from ift_peft.data.render import Renderer
from ift_peft.data.row import Row
from ift_peft.evaluate import metrics
from ift_peft.evaluate.intervals import Floats
from ift_peft.evaluate.metrics import Resampling
from ift_peft.infer.likelihood import Progress, answer_likelihoods, label_probabilities


@dataclass(frozen=True)
class Predictions:
    """What one model made of the held-out rows.

    Classification: `probabilities` of shape (rows, labels). Otherwise: `log_probabilities` of the reference answers and
    their `tokens`, both of shape (rows,).
    """

    probabilities: Floats | None = None
    log_probabilities: Floats | None = None
    tokens: Floats | None = None

    @property
    def chosen(self) -> list[int]:
        assert self.probabilities is not None
        return [int(index) for index in self.probabilities.argmax(axis=1)]


def predict_rows(
    model: Any,
    renderer: Renderer,
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
    else:
        for name, predictions in (("base", base), ("adapter", adapter)):
            assert predictions.log_probabilities is not None and predictions.tokens is not None
            scores[name] = metrics.to_json(
                metrics.language_metrics(predictions.log_probabilities, predictions.tokens, resampling)
            )
        assert base.log_probabilities is not None and adapter.log_probabilities is not None and base.tokens is not None
        change = metrics.language_change(base.log_probabilities, adapter.log_probabilities, base.tokens, resampling)
    scores["change"] = metrics.to_json(change)
    return scores


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
                line[name] = {"log_probability": round(float(predictions.log_probabilities[index]), 6)}
        lines.append(line)
    return lines
