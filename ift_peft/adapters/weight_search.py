"""Weights and density of a combination, chosen on rows that are not held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna

from ift_peft.adapters.parents import same_task, saved_rows, union_rows, without_trained
from ift_peft.adapters.weighted import Combination, add_combined
from ift_peft.data.fit import fit_rows
from ift_peft.data.instructions import ask_held_out
from ift_peft.data.render import TokenRenderer
from ift_peft.data.row import Row
from ift_peft.errors import RunError
from ift_peft.evaluate.by_source import Part, parts_of
from ift_peft.evaluate.calibration import nll_rows
from ift_peft.evaluate.compare import predict_rows
from ift_peft.infer.load import Parts, rows_trained_on
from ift_peft.recipe import Recipe
from ift_peft.reporter import Reporter
from ift_peft.stages import PRUNING

ROWS = 100  # of each run, drawn by the seed
MOST = 1.5  # largest weight that is tried
STEP = 0.05
TRAINED_ON = (
    "rows the runs were trained on, which look better than new ones: validation in their recipes sets some aside"
)
VALIDATION = "the runs' validation rows, which chose their checkpoints"


@dataclass(frozen=True)
class SearchRows:
    """Rows to choose by, those of each run numbered as its source; `kind` says what they are."""

    rows: list[Row]
    kind: str
    notes: list[str]


@dataclass(frozen=True)
class Tried:
    """A combination, its loss on each task (nats per row of labels, per token of answers), and their mean."""

    how: Combination
    by_task: dict[str, float]

    @property
    def loss(self) -> float:
        return float(np.mean(list(self.by_task.values())))

    def to_json(self) -> dict[str, Any]:
        by_task = {name: round(loss, 6) for name, loss in self.by_task.items()}
        return {"weights": list(self.how.weights), "density": self.how.density, "loss": round(self.loss, 6)} | {
            "by_task": by_task
        }


def search_rows(parents: Sequence[Parts], *, seed: int) -> SearchRows:
    """The validation rows of the runs where all have some, else some they were trained on. Never held-out ones."""
    notes: list[str] = []
    if all((parts.run.path / "validation.jsonl").is_file() for parts in parents):
        rows, notes = without_trained(
            parents, [saved_rows(parts, "validation.jsonl") for parts in parents], "validation"
        )
        kind = VALIDATION
    else:
        asked = [ask_held_out(list(rows_trained_on(parts)), parts.askers) for parts in _distinct(parents)]
        rows, kind = asked, TRAINED_ON
    drawn = []
    for parts, own in zip(_distinct(parents), rows, strict=False):
        some = random.Random(seed).sample(own, min(ROWS, len(own)))
        fitted = fit_rows(some, parts.renderer, max_length=parts.max_length, overlong="truncate")
        drawn.append(fitted.rows)
    if not all(drawn):
        raise RunError(
            expected="rows to search by of every run", found="none of some", fix="give --weights, without --search"
        )
    return SearchRows(union_rows(parents, drawn), kind, notes)


def _distinct(parents: Sequence[Parts]) -> Sequence[Parts]:
    """One of runs with the same rows."""
    return parents[:1] if same_task(parents) else parents


def search(
    model: Any,
    names: Sequence[str],
    recipe: Recipe,
    renderer: TokenRenderer,
    rows: Sequence[Row],
    *,
    start: Combination,
    trials: int,
    reporter: Reporter,
) -> list[Tried]:
    """Combinations of the adapters `names` with the loss of each on `rows`, the best first.

    The first tried are `start` and each adapter alone; Optuna's TPE draws the others by the seed of `start`, weights
    from 0 to 1.5 and, where there is one, the density from 0.1 to 1.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=start.seed))
    for how in (start, *(_alone(start, number) for number in range(len(names)))):
        study.enqueue_trial(_settings(how))
    parts = parts_of(recipe.data, recipe.evaluation, rows)
    tried: list[Tried] = []
    reporter.stage("searching weights", trials)
    for number in range(trials):
        trial = study.ask()
        drawn = (trial.suggest_float(f"weight {at}", 0.0, MOST, step=STEP) for at in range(len(names)))
        density = start.density
        if start.method in PRUNING:
            density = round(trial.suggest_float("density", 0.1, 1.0, step=0.1), 2)
        how = replace(start, weights=tuple(round(weight, 2) for weight in drawn), density=density)
        add_combined(model, names, how, name="candidate")
        one = Tried(how, _losses(model, renderer, rows, parts, recipe))
        model.set_adapter(names[0], inference_mode=True)
        model.delete_adapter("candidate")
        study.tell(trial, one.loss)
        tried.append(one)
        reporter.advance(number + 1, f"loss {one.loss:.4f}")
    reporter.finish()
    return sorted(tried, key=lambda one: one.loss)


def _alone(start: Combination, number: int) -> Combination:
    weights = tuple(float(at == number) for at in range(len(start.weights)))
    return replace(start, weights=weights)


def _settings(how: Combination) -> dict[str, float]:
    """As Optuna has them, on the steps of the search."""
    settings = {f"weight {at}": min(MOST, round(weight / STEP) * STEP) for at, weight in enumerate(how.weights)}
    return settings if how.method not in PRUNING else {**settings, "density": float(how.density or 1.0)}


def _losses(
    model: Any, renderer: TokenRenderer, rows: Sequence[Row], parts: Sequence[Part], recipe: Recipe
) -> dict[str, float]:
    tasks = [(part.name, part.labels, part.of(rows)) for part in parts]
    tasks = tasks or [(recipe.name, recipe.data.label_words, list(rows))]
    losses = {}
    for name, labels, own in tasks:
        found = predict_rows(
            model, renderer, own, labels, batch_size=recipe.evaluation.per_device_eval_batch_size, adapter=True
        )
        if found.probabilities is not None:
            truth = [labels.index(row.answer) for row in own]
            losses[name] = float(nll_rows(truth, found.probabilities).mean())
        else:
            assert found.log_probabilities is not None and found.tokens is not None
            losses[name] = float(-found.log_probabilities.sum() / found.tokens.sum())
    return losses
