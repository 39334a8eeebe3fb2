"""Train a recipe and keep its scores beside its cost: the figures of the README's table.

    python -m benchmarks.recipe_scores NAME RECIPE [section.key=value …]

The result is written to benchmarks/results/recipe_NAME.json. Overrides that name files are kept by file name only.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.record import write_result
from ift_peft.console import ConsoleReporter, print_scores
from ift_peft.recipe import load_recipe
from ift_peft.train.run import train


def public(override: str) -> str:
    """The override without the folders of this machine."""
    key, _, value = override.partition("=")
    return f"{key}={'/'.join(Path(value).parts[-2:])}" if "/" in value else override


def main(
    name: Annotated[str, typer.Argument(help="Name of the result.")],
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """Train, measure, and write down scores, time and throughput."""
    loaded = load_recipe(recipe, overrides or ())
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = train(loaded, root=Path(folder), reporter=ConsoleReporter())
        seconds = time.monotonic() - started
        scores, manifest = run.read("scores.json"), run.read("manifest.json")
    kept = ("base", "rows", "parameters", "steps", "tokens_per_second", "padding_share", "notes", "seconds")
    result = {
        "recipe": recipe,
        "overrides": [public(override) for override in overrides or ()],
        "scores": scores,
        **{key: manifest[key] for key in kept},
        "wall_seconds": round(seconds, 1),
    }
    print_scores(scores, title=f"{name}: {scores['rows']} held-out rows, {seconds / 60:.1f} minutes")
    typer.echo(f"written to {write_result(f'recipe_{name}', result)}")


if __name__ == "__main__":
    typer.run(main)
