"""Which training rows pulled an adapter towards an answer: rows whose gradient points where that answer's does."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ift_peft.data.fit import fit_rows
from ift_peft.data.instructions import asked_in
from ift_peft.data.render import Rendered
from ift_peft.data.row import Row
from ift_peft.errors import RunError
from ift_peft.infer.load import Parts, rows_trained_on
from ift_peft.model.initialise import freeze_second_half
from ift_peft.reporter import Reporter

MOST_ROWS, FEWEST_ROWS = 1000, 50
CPU_WORK = 1e13  # floating-point operations: about a minute of two cores
CAVEATS = (
    "Measured at the finished adapter alone, not along its training.",
    "A step on a row of similar gradient would make this answer likelier; that it did so in training is not shown.",
    "The gradient of a row is mostly that of its label, so rows of one label resemble each other for it alone; of a "
    "long answer it is a sum over its tokens.",
)

Loss = Callable[[Any, Rendered], Tensor]


@dataclass(frozen=True)
class Pull:
    """A training row and the cosine between its gradient and that of the explained answer: in [-1, 1]."""

    row: Row
    similarity: float


@dataclass(frozen=True)
class Influence:
    """The rows that helped an answer most and those that opposed it most, strongest first; `looked` of `rows`."""

    helping: tuple[Pull, ...]
    opposing: tuple[Pull, ...]
    looked: int
    rows: int
    weights: int


@dataclass(frozen=True)
class TrainingRows:
    """Drawn training rows, rendered as they were trained on, and how many there are in all."""

    rows: list[Row]
    rendered: list[Rendered]
    total: int


def training_rows(parts: Parts, model: Any, *, sample: int | None, seed: int) -> TrainingRows:
    """Rows of a run drawn with `seed`: `sample`, or as many as take about a minute; fewer are part of more.

    Rows are asked in their phrasing of the first epoch; changed copies (data.augment) are left out. Raises `RunError`
    where the rows that the recipe names are no longer those of training, `Faults` where they cannot be read.
    """
    rows = iter(rows_trained_on(parts))
    first = next(rows)
    _check_first(parts, asked_in(first, parts.askers[first.source], 0))
    rng, counter = random.Random(seed), itertools.count()
    numbered = zip(itertools.chain([first], rows), counter, strict=False)
    drawn = [row for row, _ in heapq.nsmallest(sample or MOST_ROWS, numbered, key=lambda _: rng.random())]
    total = next(counter)
    _check_count(parts, total)
    asked = [asked_in(row, parts.askers[row.source], 0) for row in drawn]
    fitted = fit_rows(asked, parts.renderer, max_length=parts.max_length, overlong=parts.recipe.data.overlong)
    if sample is not None or not fitted.rows:
        return TrainingRows(fitted.rows, fitted.rendered, total)
    device = next(model.parameters()).device
    work = 6 * sum(p.numel() for p in model.parameters()) * fitted.tokens / len(fitted.rows)
    limit = MOST_ROWS if device.type != "cpu" else max(FEWEST_ROWS, int(CPU_WORK / work))
    return TrainingRows(fitted.rows[:limit], fitted.rendered[:limit], total)


def _check_first(parts: Parts, row: Row) -> None:
    """Raise where the first row is not the golden one; where rows were left out it need not be."""
    if parts.run.read("manifest.json")["rows"]["train"]["dropped"]:
        return
    fitted = fit_rows([row], parts.renderer, max_length=parts.max_length, overlong="truncate")
    if list(fitted.rows[0].messages) != parts.run.read("golden.json")["messages"]:
        raise _changed(f"another first row, at {row.where}")


def _check_count(parts: Parts, total: int) -> None:
    counts = parts.run.read("manifest.json")["rows"]["train"]
    if not counts["dropped"] and parts.recipe.data.augment is None and counts["rows"] != total:
        raise _changed(f"{total} rows where there were {counts['rows']}")


def _changed(found: str) -> RunError:
    return RunError(
        expected="the rows that the run was trained on", found=found, fix="restore them, or leave them out: --rows 0"
    )


def influence(
    model: Any,
    answers: Sequence[Rendered],
    training: TrainingRows,
    loss: Loss,
    *,
    rows: int,
    halved: bool = False,
    reporter: Reporter,
) -> list[Influence]:
    """For each of `answers`, the `rows` training rows whose gradients are most, and most oppositely, like its own.

    TracIn (Pruthi et al. 2020, arXiv:2002.08484) with the finished adapter as the only checkpoint, normalised: the
    cosine between the gradients of `loss`, taken row by row over all adapter weights, without the second half of each
    matrix where that was frozen (`halved`). `model` is a `PeftModel` with its adapter on.
    """
    with _adapter_weights(model) as weights:
        frozen = freeze_second_half(model) if halved else 0
        wanted = torch.stack([_direction(loss(model, answer), weights) for answer in answers])
        reporter.stage("gradients of training rows", len(training.rows))
        similarities = torch.empty(len(training.rows), len(answers))
        for number, row in enumerate(training.rendered):
            similarities[number] = wanted @ _direction(loss(model, row), weights)
            reporter.advance(number + 1)
        reporter.finish()
        size = sum(weight.numel() for weight in weights) - frozen
    return [_strongest(of_answer.tolist(), training, rows, size) for of_answer in similarities.T]


def _strongest(similarities: Sequence[float], training: TrainingRows, rows: int, weights: int) -> Influence:
    order = sorted(range(len(similarities)), key=lambda number: -similarities[number])
    helping = [Pull(training.rows[n], similarities[n]) for n in order[:rows] if similarities[n] > 0]
    opposing = [Pull(training.rows[n], similarities[n]) for n in reversed(order[-rows:]) if similarities[n] < 0]
    return Influence(tuple(helping), tuple(opposing), len(similarities), training.total, weights)


def _direction(loss: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The gradient of `loss` as one vector of length 1, float32; 0 where it vanishes."""
    gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return F.normalize(torch.cat([gradient.flatten().float() for gradient in gradients]), dim=0)


@contextmanager
def _adapter_weights(model: Any) -> Iterator[list[Tensor]]:
    """The weights that training changed, needing a gradient; all others not."""
    before = [(weight, weight.requires_grad) for weight in model.parameters()]
    adapter = {
        id(weight)
        for name, weight in model.named_parameters()
        if model.base_model.prefix in name or "modules_to_save" in name
    }
    for weight, _ in before:
        weight.requires_grad_(id(weight) in adapter)
    try:
        yield [weight for weight, _ in before if id(weight) in adapter]
    finally:
        for weight, needed in before:
            weight.requires_grad_(needed)
