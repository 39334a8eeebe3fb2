"""How far one model's answers on held-out rows are from another's: by logits, by divergence, by the task's metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ift_peft.data.fit import Fitted
from ift_peft.data.row import Row
from ift_peft.evaluate.compare import predict_rows
from ift_peft.evaluate.intervals import Estimate, Floats, paired_change, wilson
from ift_peft.evaluate.measure import resampling
from ift_peft.evaluate.metrics import language_change, language_metrics
from ift_peft.infer.batches import pad, require_finite
from ift_peft.infer.classes import class_logits
from ift_peft.infer.likelihood import supervised_logits
from ift_peft.infer.load import Parts
from ift_peft.reporter import Reporter

_BATCH = 16


@dataclass(frozen=True)
class Answered:
    """What one model made of the held-out rows.

    `batches` are files of its float32 logits, (supervised tokens, vocabulary) or (rows, classes) each; `labels` the
    numbers of the labels it chose, where the task has any; `log_probabilities` of the answers and their `tokens` are
    of shape (rows,).
    """

    batches: tuple[Path, ...]
    labels: list[int] | None
    log_probabilities: Floats
    tokens: Floats


@dataclass(frozen=True)
class Divergence:
    """Of a model from a reference: KL(reference || model) in nats per supervised token, and logits by absolute value.

    Of a classifier with a head, a row counts as one token.
    """

    kl_mean: float
    kl_max: float
    max_logit_difference: float
    tokens: int


def answer(model: Any, parts: Parts, held_out: Fitted, folder: Path, *, who: str, reporter: Reporter) -> Answered:
    """Ask a model every held-out row. Logits go to files in `folder`, as vocabulary times tokens may exceed memory."""
    folder.mkdir(parents=True)
    rendered, rows = held_out.rendered, held_out.rows
    of_head = parts.recipe.base.head == "sequence-classification"
    model.eval()
    device = next(model.parameters()).device
    files, sums, counts = [], [], []
    reporter.stage(f"measuring {who}", len(rendered))
    for start in range(0, len(rendered), _BATCH):
        part = pad(rendered[start : start + _BATCH], parts.tokenizer.pad_token_id)
        batch = {name: tensor.to(device) for name, tensor in part.items()}
        with torch.no_grad():
            logits, targets, at = _logits(model, batch, of_head=of_head)
        require_finite(bool(torch.isfinite(logits).all()))
        files.append(folder / f"{start}.safetensors")
        save_file({"logits": logits}, files[-1])
        log_probabilities = -F.cross_entropy(logits, targets, reduction="none")
        size = len(rendered[start : start + _BATCH])
        sums.append(torch.zeros(size).index_add_(0, at, log_probabilities))
        counts.append(torch.bincount(at, minlength=size))
        reporter.advance(min(start + _BATCH, len(rendered)))
    reporter.finish()
    labels = None
    if parts.labels:
        labels = predict_rows(model, parts.renderer, rows, parts.labels, batch_size=_BATCH, adapter=True).chosen
    return Answered(tuple(files), labels, torch.cat(sums).double().numpy(), torch.cat(counts).double().numpy())


def _logits(model: Any, batch: dict[str, Tensor], *, of_head: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 logits on CPU, their targets, and the row that each belongs to."""
    if of_head:
        logits, targets = class_logits(model, batch)
        at = torch.arange(len(targets))
    else:
        logits, targets, at = supervised_logits(model, batch)
    return logits.float().cpu().contiguous(), targets.cpu(), at.cpu()


def diverge(reference: Answered, other: Answered) -> Divergence:
    """How far `other` is from `reference`, token by token."""
    divergences, differences = [], []
    for one, two in zip(reference.batches, other.batches, strict=True):
        a, b = load_file(one)["logits"].double(), load_file(two)["logits"].double()
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        divergences.append((log_a.exp() * (log_a - log_b)).sum(-1).abs())  # rounding may put a divergence of 0 below 0
        differences.append((a - b).abs().max())
    together = torch.cat(divergences)
    return Divergence(
        float(together.mean()), float(together.max()), float(torch.stack(differences).max()), len(together)
    )


def score(parts: Parts, rows: Sequence[Row], answered: Answered) -> Estimate:
    """The task's metric: accuracy where there are labels, else the loss in nats per supervised token."""
    section = parts.recipe.evaluation
    if answered.labels is not None:
        return wilson(sum(_right(parts, rows, answered)), len(rows), confidence=section.confidence)
    return language_metrics(answered.log_probabilities, answered.tokens, resampling(section))["loss"]


def change(parts: Parts, rows: Sequence[Row], before: Answered, after: Answered) -> Estimate:
    """The metric of `after` minus that of `before`, of the same rows."""
    section = parts.recipe.evaluation
    if before.labels is not None:
        one, two = _right(parts, rows, before), _right(parts, rows, after)
        return paired_change(one, two, confidence=section.confidence)
    found = language_change(before.log_probabilities, after.log_probabilities, before.tokens, resampling(section))
    return found["loss"]


def agreement(one: Answered, other: Answered) -> int | None:
    """On how many rows both chose the same label; None where there are none."""
    if one.labels is None or other.labels is None:
        return None
    return sum(a == b for a, b in zip(one.labels, other.labels, strict=True))


def _right(parts: Parts, rows: Sequence[Row], answered: Answered) -> list[bool]:
    assert answered.labels is not None
    return [parts.labels[chosen] == row.answer for chosen, row in zip(answered.labels, rows, strict=True)]
