"""The command tune: search a recipe's settings until its target is met or the budget ends."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ift_peft.cli.app import RUNS, Overrides, RunsDir, app, errors_to_exit_codes

if TYPE_CHECKING:
    from ift_peft.run_dir import RunDir


@app.command()
@errors_to_exit_codes
def tune(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    overrides: Overrides = None,
    trials: Annotated[int | None, typer.Option(help="End after this many trainings.", min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="End after this long, over all sessions.", min=0.01)] = None,
    tokens: Annotated[int | None, typer.Option(help="End after this many tokens trained on.", min=1)] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start the study of this recipe over.")] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Search a recipe's settings on validation rows, until evaluation.target is met or a limit is reached.

    The best is measured on the held-out rows, once, and becomes a run as train makes one. Stopped or killed, the same
    command goes on. Exits with 8 where the held-out rows miss the target.

    Example: ift tune sentiment evaluation.target.accuracy=0.7 --minutes 60
    """
    from ift_peft.console import ConsoleReporter, loading, out, print_scores
    from ift_peft.errors import raise_all
    from ift_peft.evaluate.gates import missed
    from ift_peft.recipe import load_recipe
    from ift_peft.run_dir import open_run
    from ift_peft.selection import Tune

    loaded = load_recipe(recipe, overrides or ())
    given = {"trials": trials, "minutes": minutes, "tokens": tokens}
    limits = {name: value for name, value in given.items() if value is not None}
    if limits:  # what the command line says stands for all that the recipe says
        section = (loaded.tune or Tune()).model_copy(update={name: limits.get(name) for name in given})
        loaded = loaded.model_copy(update={"tune": section})
    with loading("torch, transformers, peft, trl, optuna"):
        from ift_peft.tune.study import tune as search

    study = search(loaded, root=runs_dir, fresh=fresh, reporter=ConsoleReporter())
    found = study.read("study.json")
    run = open_run(study.path / found["run"])
    scores = run.read("scores.json")
    _print_trials(found, study)
    print_scores(scores, title=f"{loaded.name}: {scores['rows']} held-out rows, measured once")
    folder = os.path.relpath(run.path)
    out.print(
        f"study    {os.path.relpath(study.path)}\nrun      {folder}\npredict  ift predict {folder} TEXT", markup=False
    )
    raise_all(missed(scores))


def _print_trials(found: dict[str, Any], study: RunDir) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ift_peft.console import out

    settings = list(dict.fromkeys(path for trial in found["trials"] for path in trial["settings"]))
    table = Table(title=f"trials by validation {found['metric']}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("", *(path.rpartition(".")[2] for path in settings), found["metric"], "steps", "state"):
        table.add_column(heading, justify="left" if heading == "state" else "right")
    for trial in found["trials"]:
        score = trial.get("score")
        cell = f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" if score else ""
        mark = "*" if trial["number"] == found["best"] else ""
        values = [_shown(trial["settings"].get(path)) for path in settings]
        row = [f"{mark}{trial['number']}", *values, cell, str(trial.get("steps", "")), _state(trial)]
        table.add_row(*map(escape, row))
    out.print(table)
    spent = found["spent"]
    out.print(
        f"\n{spent['trials']} trials, {spent['minutes']:g} minutes, {spent['tokens']:,} tokens; {found['ended_by']}.\n"
        f"* is the best of {spent['trials']} by the rows it was chosen by, so that score is optimistic;\n"
        "the result is the score on the held-out rows.",
        markup=False,
    )
    if found["importances"]:
        shares = ", ".join(f"{path} {share:.2f}" for path, share in found["importances"].items())
        out.print(f"share of each setting in the differences (PED-ANOVA): {shares}", markup=False)
    out.print()


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _state(trial: dict[str, Any]) -> str:
    """How a trial ended, in words."""
    if "same_as" in trial:
        return f"same as {trial['same_as']}"
    words = [trial["state"]]
    if trial.get("stopped_by") not in (None, "pruned"):
        words.append(f"at the limit of {trial['stopped_by']}")
    if trial.get("stopped_early"):
        words.append("stopped early")
    if "continued_from" in trial:
        words.append(f"continues {trial['continued_from']}")
    return ", ".join(words)
