"""Adapters of several domains combined in every way asked for, and all of them measured on every domain."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ift_peft.adapters.combine import Asked, combine, parents_of
from ift_peft.adapters.parents import check_parents, union_held_out, union_recipe
from ift_peft.data.row import Row
from ift_peft.environment import versions
from ift_peft.evaluate.compare import Predictions, compare, predict_rows
from ift_peft.evaluate.measure import resampling
from ift_peft.infer.batches import Progress
from ift_peft.infer.ensemble import together
from ift_peft.infer.load import Parts, load_members, open_parts
from ift_peft.recipe import Recipe, parent_recipes, validate
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir, open_run, runs_called
from ift_peft.stages import TOGETHER, Combining, Merging
from ift_peft.train.once import add_part, found_or_trained, made_of_parts, prepare_parts
from ift_peft.yaml_source import YamlSource, laid_over

BASE = "base"
Arms = dict[str, dict[str, Predictions]]  # of each arm on each domain


def train_merging(
    recipe: Recipe,
    *,
    root: Path,
    reporter: Reporter,
    into: RunDir | None = None,
    step_timeout: float | None = None,
) -> RunDir:
    """Train the parents in `merging` and one on all their rows, combine the parents, measure all; a run of all that.

    Every adapter is a run below `root`; one made before of the same rows, settings and versions is taken. Raises
    `RecipeError`, `DataError`, `ModelError` or `RunError` for the faults of all parents before any is trained.
    """
    merging = recipe.merging
    assert merging is not None
    own_parts = prepare_parts({f"parent {name}": own for name, own in parent_recipes(recipe).items()}, reporter)
    with made_of_parts(recipe, "merging", root, into=into) as run:
        for number, (name, own) in enumerate(own_parts.items(), start=1):
            told = f"{name} ({number} of {len(own_parts)})"
            made = found_or_trained(own, root, told=told, reporter=reporter, step_timeout=step_timeout)
            add_part(run, name.partition(" ")[2], made)
        parents = [open_parts(part) for part in run.parts.values()]
        check_parents(parents)
        if merging.together is not None:
            both = prepare_parts({TOGETHER: _recipe_of_all(recipe, parents, merging.together)}, reporter)[TOGETHER]
            made = found_or_trained(both, root, told=TOGETHER, reporter=reporter, step_timeout=step_timeout)
            add_part(run, TOGETHER, made)
        for one in merging.combine:
            add_part(run, one.called, _combined(recipe, parents, one, root, reporter))
        run.write("scores.json", _measure(recipe, run, merging, reporter))
    return run


def _recipe_of_all(recipe: Recipe, parents: Sequence[Parts], part: dict[str, Any]) -> Recipe:
    """That of the adapter trained on the rows of all domains: what the parents have alike, and `part` over it."""
    name = f"{recipe.name}.{TOGETHER}"
    alike = union_recipe(parents, name=name, description="one adapter trained on the rows of all domains")
    return validate(YamlSource(name, laid_over(alike.model_dump(mode="json"), part)))


def _combined(recipe: Recipe, parents: Sequence[Parts], one: Combining, root: Path, reporter: Reporter) -> RunDir:
    name = f"{recipe.name}.{re.sub('[^A-Za-z0-9._]+', '-', one.called)}"
    asked = one.model_dump(mode="json")
    for run in runs_called(root, name):
        entries = run.read("manifest.json")
        same = entries.get("asked") == asked and entries.get("combined_from") == parents_of(parents)
        if same and run.is_whole and entries.get("versions") == versions():
            reporter.note(f"{one.called}: combined before, {name}/{run.path.name}")
            return run
    reporter.note(one.called)
    how = Asked(one.method, one.weights, one.density, one.rank, recipe.evaluation.seed, one.search)
    run = combine([parts.run for parts in parents], how, name=name, root=root, reporter=reporter)
    run.update_manifest(asked=asked)
    return run


def _measure(recipe: Recipe, run: RunDir, merging: Merging, reporter: Reporter) -> dict[str, Any]:
    """The content of scores.json: on each domain the score of every arm, and its change from the domain's own."""
    parts = {name: open_parts(open_run(part.path)) for name, part in run.parts.items()}
    parents = {name: parts[name] for name in merging.parents}
    rows, notes = union_held_out(list(parents.values()), reporter)
    domains = {
        name: ([row for row in rows if row.source == number], own.labels)
        for number, (name, own) in enumerate(parents.items())
    }
    arms = _answers(parts, domains, reporter)
    for kind in merging.ensembles:
        arms[f"ensemble, {kind}"] = {
            domain: Predictions(probabilities=together(np.stack(found), kind))
            for domain, (_, labels) in domains.items()
            if labels
            for found in [[_probabilities(arms[name][domain]) for name in parents]]
        }
    section, scores = resampling(recipe.evaluation), dict[str, Any]()
    for domain, (own, labels) in domains.items():
        metric = "accuracy" if labels else "loss"
        told = {}
        for arm, answers in arms.items():
            if domain in answers:
                found = compare(own, labels, arms[domain][domain], answers[domain], section)
                told[arm] = {"score": found["adapter"][metric], "change": found["change"][metric]}
        scores[domain] = {"rows": len(own), "metric": metric, "arms": told}
    return {
        "rows": len(rows),
        "domains": scores,
        "mean": _means(scores),
        "intervals": section.describe(),
        "notes": notes,
    }


def _answers(
    parts: Mapping[str, Parts], domains: Mapping[str, tuple[list[Row], tuple[str, ...]]], reporter: Reporter
) -> Arms:
    """What base and every adapter, all on one base, make of the held-out rows of each domain."""
    model, names, _ = load_members(list(parts.values()))
    renderer = next(iter(parts.values())).renderer
    size = next(iter(parts.values())).recipe.evaluation.per_device_eval_batch_size
    arms: Arms = {}
    for arm, adapter in {BASE: None, **dict(zip(parts, names, strict=True))}.items():
        if adapter is not None:
            model.set_adapter(adapter, inference_mode=True)
        reporter.stage(f"measuring {arm}", sum(len(rows) * max(1, len(labels)) for rows, labels in domains.values()))
        arms[arm], before = {}, 0
        for domain, (rows, labels) in domains.items():
            arms[arm][domain] = predict_rows(
                model,
                renderer,
                rows,
                labels,
                batch_size=size,
                adapter=adapter is not None,
                progress=_advance(reporter, before),
            )
            before += len(rows) * max(1, len(labels))
        reporter.finish()
    return arms


def _advance(reporter: Reporter, before: int) -> Progress:
    return lambda done, total: reporter.advance(before + done)


def _probabilities(found: Predictions) -> Any:
    assert found.probabilities is not None
    return found.probabilities


def _means(scores: Mapping[str, Any]) -> dict[str, float]:
    """The mean over domains of each arm that was measured on all, where all have one metric."""
    if len({own["metric"] for own in scores.values()}) > 1:
        return {}
    first, *others = (own["arms"] for own in scores.values())
    both = [arm for arm in first if all(arm in own for own in others)]
    return {arm: round(float(np.mean([own[arm]["score"]["value"] for own in (first, *others)])), 6) for arm in both}
