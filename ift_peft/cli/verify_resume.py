"""The command verify-resume: is a run that was killed, on this machine, the run that it would have been?"""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from ift_peft.cli.app import RUNS, Overrides, RunsDir, app, errors_to_exit_codes
from ift_peft.errors import TrainingError

if TYPE_CHECKING:
    from ift_peft.train.verify_resume import Verdict


@app.command("verify-resume")
@errors_to_exit_codes
def verify_resume(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    overrides: Overrides = None,
    kills: Annotated[int, typer.Option(help="How often the second run is killed with SIGKILL.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Train this many steps; 0: as many as the recipe says.", min=0)] = 20,
    rows: Annotated[int, typer.Option(help="Measure on this many held-out rows; 0: on all.", min=0)] = 16,
    seed: Annotated[int, typer.Option(help="Draws the moments of the kills.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Keep both runs, which are deleted otherwise.")] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Train a recipe twice, kill one of the two again and again, and compare: losses, weights, order of the rows.

    Exits with 6 where the run that was killed did not end as the other. The result is kept beside the runs.

    Example: ift verify-resume sentiment --kills 3 --steps 20
    """
    from ift_peft.console import ConsoleReporter, out
    from ift_peft.durable import write_atomically
    from ift_peft.recipe import load_recipe
    from ift_peft.train import verify_resume as proving

    loaded = proving.shortened(load_recipe(recipe, overrides or ()), steps=steps, rows=rows)
    home = runs_dir / loaded.name
    folder = home / f"verify-resume-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        verdict = proving.verify_resume(loaded, kills=kills, seed=seed, folder=folder, reporter=ConsoleReporter())
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    result = home / "verify-resume.json"
    write_atomically(result, json.dumps(proving.to_json(verdict), ensure_ascii=False, indent=2) + "\n")
    _print(verdict)
    out.print(f"result   {result}" + (f"\nruns     {folder}" if keep else ""), markup=False)
    _require_equal(verdict)


def _print(verdict: Verdict) -> None:
    from rich.table import Table

    from ift_peft.console import out

    table = Table(title=f"{len(verdict.kills)} kills in {verdict.steps} steps")
    for heading in ("kill after step", "while", "went on from", "passed over"):
        table.add_column(heading)
    for kill in verdict.kills:
        doing = "writing a checkpoint" if kill.writing else "training"
        table.add_row(str(kill.after_step), doing, kill.resumed_from or "its start", "\n".join(kill.passed_over) or "–")
    out.print(table)
    for what, same in (
        (f"losses of {verdict.steps} steps", verdict.first_loss is None),
        ("weights, bit by bit", not verdict.tensors),
        ("rows and their order", verdict.same_order),
        ("scores", verdict.same_scores),
    ):
        out.print(f"{what:<24} {'equal' if same else 'DIFFERENT'}", markup=False)


def _require_equal(verdict: Verdict) -> None:
    if verdict.equal:
        return
    found = [
        f"another loss from step {verdict.first_loss} on" if verdict.first_loss is not None else "",
        f"{len(verdict.tensors)} other tensors, such as {verdict.tensors[0]}" if verdict.tensors else "",
        "" if verdict.same_order else "other rows, or another order",
        "" if verdict.same_scores else "other scores",
    ]
    fix = "tell us, with the recipe and the result"
    if not verdict.deterministic:
        fix = "two runs that nobody killed differ on this machine as well: it does not repeat itself bit by bit"
    raise TrainingError(expected="the run that nobody killed", found=", ".join(filter(None, found)), fix=fix)
