"""The learning curve of a recipe: its score at growing numbers of training rows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ift_peft.data.rows import read_rows
from ift_peft.data.store import file_digest, files_of
from ift_peft.environment import versions
from ift_peft.errors import RecipeError, RunError
from ift_peft.evaluate.charts import Curve, curve_chart
from ift_peft.evaluate.contrast import contrast
from ift_peft.evaluate.intervals import Estimate
from ift_peft.evaluate.measure import resampling
from ift_peft.model.tokenizer import locate_base
from ift_peft.recipe import Recipe, require_one_task
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir, open_run
from ift_peft.train.run import train


@dataclass(frozen=True)
class Point:
    """The score at a number of training rows: the mean over the runs of all seeds, and each run's own."""

    rows: int
    metric: str
    estimate: Estimate
    by_run: tuple[float, ...]
    runs: tuple[str, ...]
    base: float


def learning_curve(
    recipe: Recipe, *, rows: Sequence[int], seeds: int, root: Path, output: Path, reporter: Reporter
) -> list[Point]:
    """Train on the first of `rows`, the next, …, each part contained in the next, and write curve.json and curve.svg.

    Runs that an earlier curve.json in `output` names, and that still fit, are taken from there. Raises `RecipeError`
    where the recipe has fewer rows than asked for, before anything is trained.
    """
    require_one_task(recipe, by="a learning curve")
    if recipe.data.streaming:
        raise RecipeError(expected="rows that are read at once", found="data.streaming", fix="data.streaming=false")
    there = len(read_rows(recipe.data)[0])
    if rows[-1] > there:
        raise RecipeError(
            expected=f"at most {there} training rows", found=f"--rows {rows[-1]}", fix="lower the largest number"
        )
    output.mkdir(parents=True, exist_ok=True)
    content = _content(recipe)
    known = _known(output / "curve.json", content)
    points: list[Point] = []
    for number in rows:
        runs: list[RunDir] = []
        for step in range(seeds):
            data = recipe.data.model_copy(update={"max_train_rows": number})
            one = recipe.model_copy(update={"data": data}).with_seed(step)
            reporter.note(f"{number:,} rows, seed {one.training['seed']}")
            runs.append(_found(known, one) or train(one, root=root, reporter=reporter))
            points = [point for point in points if point.rows != number] + [_point(number, runs, recipe)]
            _write(points, output, recipe, content, known)  # after each run, so that stopping loses none
    return points


def _content(recipe: Recipe) -> str:
    """What the rows' files and the base hold, by hash: runs made of something else are no part of the curve."""
    digest = hashlib.sha256(locate_base(recipe.base.model, revision=recipe.base.revision).fingerprint().encode())
    for part, _ in recipe.data.by_source():
        for source in (part.train, part.test, recipe.data.test):
            for file in files_of(source) or ():
                digest.update(file_digest(file))
    return digest.hexdigest()


def _known(path: Path, content: str) -> list[RunDir]:
    """The finished runs of an earlier curve over the same content."""
    earlier = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if earlier.get("content") != content:
        return []
    found = []
    for name in earlier["runs"]:
        try:
            found.append(open_run(path.parent / name))
        except RunError:  # deleted since: it is trained again
            continue
    return found


def _found(known: Sequence[RunDir], recipe: Recipe) -> RunDir | None:
    return next((run for run in known if run.recipe() == recipe), None)


def _point(rows: int, runs: Sequence[RunDir], recipe: Recipe) -> Point:
    pooled = contrast(runs, resampling(recipe.evaluation))
    if len(pooled.arms) != 1:
        raise RunError(
            expected=f"runs of {rows} rows that differ in their seed alone",
            found=f"{len(pooled.arms)} kinds: rows, base or template changed since the curve was begun",
            fix="give another --output, and the curve is made anew",
        )
    probe = pooled.probes[0]
    score = probe.scores[0]
    base = runs[0].read("scores.json")["base"]
    value = next(iter(base.values()))["value"]
    return Point(rows, probe.metric, score.estimate, score.by_run, tuple(str(run.path) for run in runs), value)


def _write(points: Sequence[Point], output: Path, recipe: Recipe, content: str, known: Sequence[RunDir]) -> None:
    lines: list[dict[str, Any]] = [
        {
            "rows": point.rows,
            "metric": point.metric,
            **point.estimate.to_json(),
            "by_run": list(point.by_run),
            "runs": [os.path.relpath(run, output) for run in point.runs],
        }
        for point in points
    ]
    folder = RunDir(output)
    runs = [*(str(run.path) for run in known), *(run for point in points for run in point.runs)]
    relative = list(dict.fromkeys(os.path.relpath(run, output) for run in runs))
    folder.write(
        "curve.json",
        {"recipe": recipe.name, "points": lines, "runs": relative, "content": content, "versions": versions()},
    )
    curve = Curve(
        recipe.name,
        tuple(point.rows for point in points),
        tuple(point.estimate for point in points),
        tuple(point.by_run for point in points),
    )
    metric = points[0].metric
    curve_chart(
        [curve],
        output / "curve.svg",
        title=f"{recipe.name}: {metric} against training rows",
        metric=metric,
        reference=("base", points[0].base),
    )
