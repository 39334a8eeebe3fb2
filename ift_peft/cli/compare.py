"""Commands on several runs: compare, curve."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ift_peft.cli.app import RUNS, Overrides, RunsDir, app, errors_to_exit_codes
from ift_peft.errors import RecipeError, RunError

if TYPE_CHECKING:
    from ift_peft.run_dir import RunDir

SAMPLES = 2000


@app.command()
@errors_to_exit_codes
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; those that differ in seeds alone are pooled.")],
    output: Annotated[Path | None, typer.Option(help="Folder for comparison.json and comparison.svg.")] = None,
    samples: Annotated[int, typer.Option(help="Bootstrap resamples.", min=100)] = SAMPLES,
    seed: Annotated[int, typer.Option(help="Seed of the resampling.")] = 0,
    confidence: Annotated[float, typer.Option(help="Of the intervals.", min=0.5, max=0.999)] = 0.95,
) -> None:
    """Set runs side by side: scores by arm, and every difference with its interval and p-value.

    Example: ift compare runs/sentiment/2026* runs/sentiment-diverse/2026* --output comparison
    """
    from ift_peft.cli.tables import print_contrast
    from ift_peft.console import out
    from ift_peft.durable import write_atomically
    from ift_peft.environment import versions
    from ift_peft.evaluate.charts import interval_chart
    from ift_peft.evaluate.contrast import contrast
    from ift_peft.evaluate.metrics import Resampling
    from ift_peft.run_dir import open_run

    opened: dict[Path, RunDir] = {}
    for path in runs:
        run = open_run(path)
        opened.setdefault(run.path, run)
    if len(opened) < 2:
        raise RunError(
            expected="at least two runs", found=f"{len(opened)}", fix="name more of them (ift runs lists them)"
        )
    result = contrast(list(opened.values()), Resampling(samples, confidence, seed))
    print_contrast(result)
    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    content = {**result.to_json(), "versions": versions()}
    write_atomically(output / "comparison.json", json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    interval_chart(result, output / "comparison.svg", title="Adapters on the same held-out rows")
    out.print(f"written to {os.path.relpath(output)}: comparison.json, comparison.svg", markup=False)


@app.command()
@errors_to_exit_codes
def curve(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    overrides: Overrides = None,
    rows: Annotated[str, typer.Option(help="Numbers of training rows, with commas.")] = "100,300,1000,3000",
    seeds: Annotated[int, typer.Option(help="Runs at each number of rows, with one seed after another.", min=1)] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for curve.json and curve.svg, gone on with if it is there; by default RUNS/curves/RECIPE."
        ),
    ] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Train on growing parts of the rows and show the score against their number.

    Example: ift curve sentiment --rows 100,300,1000,3000 --output curve
    """
    from ift_peft.console import ConsoleReporter, loading, out
    from ift_peft.recipe import load_recipe

    try:
        numbers = sorted({int(number) for number in rows.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise RecipeError(expected="--rows as numbers with commas", found=repr(rows), fix="--rows 100,300,1000")
    loaded = load_recipe(recipe, overrides or ())
    folder = output or runs_dir / "curves" / loaded.name
    with loading("torch, transformers, peft, trl"):
        from ift_peft.train.curve import learning_curve

    points = learning_curve(loaded, rows=numbers, seeds=seeds, root=runs_dir, output=folder, reporter=ConsoleReporter())
    for point in points:
        score = point.estimate
        out.print(f"{point.rows:>9,} rows  {score.value:.3f} [{score.low:.3f}, {score.high:.3f}]", markup=False)
    out.print(f"written to {os.path.relpath(folder)}: curve.json, curve.svg", markup=False)
