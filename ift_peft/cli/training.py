"""Commands that make and list runs: train, recipes, runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ift_peft.cli.app import RUNS, Overrides, RunsDir, app, errors_to_exit_codes
from ift_peft.errors import RecipeError, RunError

if TYPE_CHECKING:
    from ift_peft.recipe import Recipe
    from ift_peft.run_dir import RunDir


@app.command()
@errors_to_exit_codes
def train(
    recipe: Annotated[str | None, typer.Argument(help="A shipped recipe's name or a YAML file.")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this unfinished run instead.")] = None,
    seeds: Annotated[int, typer.Option(help="Train this many runs, with one seed after another.", min=1)] = 1,
    step_timeout: Annotated[
        float | None,
        typer.Option(
            help="End when no step is done for so many seconds; 0: never. By default 600, or 20 times the longest "
            "step so far.",
            min=0,
        ),
    ] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Train a recipe, measure it before and after, and write the run.

    Example: ift train sentiment training.num_train_epochs=2
    """
    from ift_peft.console import ConsoleReporter, loading, out, print_scores
    from ift_peft.errors import raise_all
    from ift_peft.evaluate.gates import missed
    from ift_peft.recipe import load_recipe
    from ift_peft.run_dir import ANY, open_run

    if (recipe is None) == (resume is None):
        raise RecipeError(
            expected="a recipe or --resume RUN", found="both" if recipe else "neither", fix="ift train sentiment"
        )
    if resume is not None and seeds > 1:
        raise RecipeError(expected="--seeds or --resume", found="both", fix="resume one run at a time")
    loaded = load_recipe(recipe, overrides or ()) if recipe is not None else None
    unfinished = None if resume is None else open_run(resume, finished=False, kinds=ANY)
    whole = loaded if unfinished is None else unfinished.recipe()
    assert whole is not None
    if whole.pipeline is not None or whole.merging is not None:
        _train_parts(whole, unfinished, seeds=seeds, root=runs_dir, step_timeout=step_timeout)
        return
    with loading("torch, transformers, peft, trl"):
        from ift_peft.train import run as training
    if seeds > 1:
        _train_seeds(whole, seeds, root=runs_dir, step_timeout=step_timeout)
        return
    reporter = ConsoleReporter()
    if unfinished is None:
        run = training.train(whole, root=runs_dir, reporter=reporter, step_timeout=step_timeout)
    else:
        run = training.resume(unfinished, reporter=reporter, step_timeout=step_timeout)
    name, scores = run.recipe().name, run.read("scores.json")
    print_scores(scores, title=f"{name}: {scores['rows']} held-out rows")
    folder = os.path.relpath(run.path.parent / "latest" if resume is None else run.path)
    out.print(
        f"run      {os.path.relpath(run.path)}\nreport   {os.path.relpath(run.path / 'report.html')}\n"
        f"predict  ift predict {folder} TEXT\nmerge    ift merge {folder}",
        markup=False,
    )
    raise_all(missed(scores))


def _train_seeds(recipe: Recipe, seeds: int, *, root: Path, step_timeout: float | None) -> None:
    """Train a recipe with so many seeds, one after another, and show what they scored together."""
    from ift_peft.cli.tables import print_contrast
    from ift_peft.console import ConsoleReporter, out
    from ift_peft.errors import raise_all
    from ift_peft.evaluate.contrast import contrast
    from ift_peft.evaluate.gates import missed
    from ift_peft.evaluate.measure import resampling
    from ift_peft.train.run import train

    reporter, runs = ConsoleReporter(), []
    for step in range(seeds):
        reporter.note(f"run {step + 1} of {seeds}")
        seeded = recipe if step == 0 else recipe.with_seed(step)
        runs.append(train(seeded, root=root, reporter=reporter, step_timeout=step_timeout))
        out.print(f"run      {os.path.relpath(runs[-1].path)}", markup=False)
    print_contrast(contrast(runs, resampling(recipe.evaluation)))
    raise_all([fault for one in runs for fault in missed(one.read("scores.json"))])


def _train_parts(recipe: Recipe, into: RunDir | None, *, seeds: int, root: Path, step_timeout: float | None) -> None:
    """Train a recipe of several adapters, or go on with `into`."""
    from ift_peft.cli.merging import print_merging
    from ift_peft.cli.pipeline import print_pipeline
    from ift_peft.console import ConsoleReporter, loading, out
    from ift_peft.errors import raise_all
    from ift_peft.evaluate.gates import missed_parts

    if seeds > 1:
        raise RecipeError(
            expected="--seeds with the recipe of one task", found="one of several adapters", fix="leave out --seeds"
        )
    with loading("torch, transformers, peft, trl"):
        from ift_peft.merging import train_merging
        from ift_peft.train.once import unfinished
        from ift_peft.train.pipeline import train_pipeline

    root = root if into is None else unfinished(into).path.parent.parent
    make, tell = (train_merging, print_merging) if recipe.merging is not None else (train_pipeline, print_pipeline)
    run = make(recipe, root=root, reporter=ConsoleReporter(), into=into, step_timeout=step_timeout)
    scores = run.read("scores.json")
    tell(scores, title=f"{recipe.name}: {scores['rows']} held-out rows")
    folder = os.path.relpath(run.path.parent / "latest" if into is None else run.path)
    for name, part in run.parts.items():
        out.print(f"{name}: {os.path.relpath(part.path)}", markup=False)
    out.print(
        f"run      {os.path.relpath(run.path)}\nreport   {os.path.relpath(run.path / 'report.html')}", markup=False
    )
    if run.kind == "pipeline":
        out.print(f"pipeline ift pipeline {folder} TEXT", markup=False)
    raise_all(missed_parts(run))


@app.command()
@errors_to_exit_codes
def recipes(
    show: Annotated[str | None, typer.Option(help="Print this recipe's YAML.")] = None,
) -> None:
    """List the recipes that ship, with a line each.

    Example: ift recipes --show sentiment
    """
    from ift_peft.console import out
    from ift_peft.recipe import find_recipe, load_recipe, shipped_recipes

    if show is not None:
        out.print(find_recipe(show).read_text("utf-8"), markup=False, end="")
        return
    for name in shipped_recipes():
        out.print(f"{name:<20} {load_recipe(name).description}", markup=False)


@app.command()
@errors_to_exit_codes
def runs(runs_dir: RunsDir = RUNS) -> None:
    """List runs with their status and scores.

    Example: ift runs --runs-dir runs
    """
    from rich.table import Table

    from ift_peft.console import out
    from ift_peft.run_dir import list_runs

    table = Table(show_header=True)
    table.add_column("run", overflow="fold")  # a path that is cut off could not be given to another command
    for heading in ("status", "base model", "metric", "base", "adapter", "rows"):
        table.add_column(heading)
    for run in list_runs(runs_dir):
        try:
            manifest = run.read("manifest.json")
            scores = run.read("scores.json") if (run.path / "scores.json").is_file() else {}
        except RunError:
            table.add_row(os.path.relpath(run.path), "unreadable")
            continue
        if run.kind != "adapter":
            scores = {"rows": scores.get("rows", "")}
        metric = next(iter(scores.get("adapter", {})), "")
        cells = [f"{scores[who][metric]['value']:.3f}" if metric else "" for who in ("base", "adapter")]
        base = manifest.get("base", {}).get("name", "")
        table.add_row(os.path.relpath(run.path), run.status, base, metric, *cells, str(scores.get("rows", "")))
    out.print(table)
