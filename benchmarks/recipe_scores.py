"""Keep a finished run's scores beside its cost and its command: the figures of the README's table.

    ift train sentiment
    python -m benchmarks.recipe_scores builtin runs/sentiment/latest

The result is written to benchmarks/results/recipe_NAME.json. Of paths in overrides the last two parts are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.record import write_result
from ift_peft.cli.merging import print_merging
from ift_peft.cli.pipeline import print_pipeline
from ift_peft.console import print_scores
from ift_peft.run_dir import ANY, open_run

KEPT = (
    "base",
    "rows",
    "parameters",
    "steps",
    "tokens_per_second",
    "padding_share",
    "notes",
    "seconds",
    "git",
    "inputs",
)
KEPT_OF_PARTS = ("seconds", "git")


def public(argument: str) -> str:
    """The argument without the folders of this machine."""
    key, equals, value = argument.rpartition("=")
    return f"{key}{equals}{'/'.join(Path(value).parts[-2:])}" if "/" in value else argument


def main(
    name: Annotated[str, typer.Argument(help="Name of the result.")],
    run: Annotated[Path, typer.Argument(help="A finished run.")],
) -> None:
    """Write down a run's scores, time and throughput."""
    opened = open_run(run, kinds=ANY)
    scores, manifest = opened.read("scores.json"), opened.read("manifest.json")
    result = {
        "command": " ".join(map(public, manifest["command"])),
        "scores": scores,
        **{key: manifest[key] for key in (KEPT if opened.kind == "adapter" else KEPT_OF_PARTS)},
    }
    tell = {"adapter": print_scores, "pipeline": print_pipeline, "merging": print_merging}[opened.kind]
    tell(scores, title=f"{name}: {scores['rows']} held-out rows, {manifest['seconds'] / 60:.1f} minutes")
    typer.echo(f"written to {write_result(f'recipe_{name}', result)}")


if __name__ == "__main__":
    typer.run(main)
