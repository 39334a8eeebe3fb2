"""The command combine: adapters of several runs into one."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ift_peft.cli.app import RUNS, RunsDir, app, errors_to_exit_codes
from ift_peft.errors import RunError

if TYPE_CHECKING:
    from ift_peft.run_dir import RunDir


class MethodName(StrEnum):
    linear = "linear"
    svd = "svd"
    ties = "ties"
    dare_linear = "dare_linear"
    dare_ties = "dare_ties"
    magnitude_prune = "magnitude_prune"


@app.command()
@errors_to_exit_codes
def combine(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs of one base.")],
    method: Annotated[MethodName, typer.Option(help="How (docs/combine.md).")] = MethodName.linear,
    weights: Annotated[
        str | None, typer.Option(help="One for each run, with commas; by default those of a mean.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of each delta kept by ties, dare_… and magnitude_prune; default 0.5.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of the result; default: the sum of the runs', of svd the largest.", min=1)
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Choose weights and density on rows not held out.")] = False,
    trials: Annotated[int, typer.Option(help="Combinations that --search tries.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of what DARE drops, and of the search.")] = 0,
    output_name: Annotated[str | None, typer.Option(help="Name of the result, as of a recipe.")] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Combine the adapters of several runs on one base into one, and measure it on the rows that they hold out.

    Example: ift combine runs/topics/latest runs/sst2/latest --method ties --output-name both
    """
    from ift_peft.console import ConsoleReporter, loading, out, print_scores
    from ift_peft.errors import raise_all
    from ift_peft.evaluate.gates import missed
    from ift_peft.run_dir import open_run

    given = None if weights is None else _numbers(weights)
    opened = [open_run(run) for run in runs]
    with loading():
        from ift_peft.adapters.combine import Asked
        from ift_peft.adapters.combine import combine as combine_runs

    asked = Asked(method.value, given, density, rank, seed, trials if search else None)
    run = combine_runs(opened, asked, name=output_name, root=runs_dir, reporter=ConsoleReporter())
    recipe, scores = run.recipe(), run.read("scores.json")
    if search:
        _print_search(run)
    print_scores(scores, title=f"{recipe.name}: {scores['rows']} held-out rows" + (", measured once" if search else ""))
    folder = os.path.relpath(run.path.parent / "latest")
    out.print(
        f"{recipe.description}\nrun      {os.path.relpath(run.path)}\n"
        f"report   {os.path.relpath(run.path / 'report.html')}\npredict  ift predict {folder} TEXT",
        markup=False,
    )
    raise_all(missed(scores))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise RunError(expected="--weights as numbers with commas", found=repr(text), fix="--weights 0.5,0.5") from None


def _print_search(run: RunDir) -> None:
    from rich.table import Table

    from ift_peft.console import out

    found = run.read("search.json")
    table = Table(title=f"combinations by loss on {found['rows']} rows", title_justify="left", box=None)
    tasks = list(found["tried"][0]["by_task"])
    pruned = found["tried"][0]["density"] is not None
    for heading in ("weights", *(["density"] if pruned else []), *(tasks if len(tasks) > 1 else []), "loss"):
        table.add_column(heading, justify="right")
    for one in found["tried"][:10]:
        cells = [", ".join(f"{weight:g}" for weight in one["weights"]), *([f"{one['density']:g}"] if pruned else [])]
        losses = [f"{one['by_task'][task]:.4f}" for task in tasks] if len(tasks) > 1 else []
        table.add_row(*cells, *losses, f"{one['loss']:.4f}")
    out.print(table)
    out.print(
        f"\nthe best of {len(found['tried'])}, chosen by {found['chosen_by']};\n"
        "its loss is optimistic, and the result is the score on the held-out rows\n",
        markup=False,
    )
