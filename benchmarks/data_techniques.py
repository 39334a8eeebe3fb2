"""What diverse instructions and augmentation buy: three recipes, three seeds each, on the same held-out rows.

    python -m benchmarks.data_techniques builtin
    python -m benchmarks.data_techniques online_shopping data.train=… data.test=… (any overrides)

Runs that are in --runs-dir already, with the same recipe, are taken from there. The comparison is written to
benchmarks/results/techniques_NAME.json and .svg.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.record import RESULTS, write_result
from ift_peft.recipe import Recipe, load_recipe
from ift_peft.run_dir import RunDir, list_runs

RECIPES = ("sentiment", "sentiment-diverse", "sentiment-augmented")
SETTINGS = (
    "data.max_train_rows=3000",
    "evaluation.max_unseen_rows=150",
    "evaluation.forgetting=false",
    "base.device=cpu",
)


def found(recipe: Recipe, runs_dir: Path) -> RunDir | None:
    """A finished run of exactly this recipe."""
    return next((run for run in list_runs(runs_dir) if run.status == "succeeded" and run.recipe() == recipe), None)


def main(
    name: Annotated[str, typer.Argument(help="Name of the result.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides for all recipes.")] = None,
    seeds: int = 3,
    runs_dir: Path = Path("runs/techniques"),
) -> None:
    """Train what is missing, then compare."""
    runs: list[str] = []
    for seed in range(seeds):
        for recipe in RECIPES:
            settings = (f"training.seed={seed}", *SETTINGS, *(overrides or ()))
            wanted = load_recipe(recipe, settings)
            if found(wanted, runs_dir) is None:
                command = [sys.executable, "-m", "ift_peft", "train", recipe, *settings, "--runs-dir", str(runs_dir)]
                subprocess.run(command, check=True)
            run = found(wanted, runs_dir)
            assert run is not None
            runs.append(str(run.path))
    with tempfile.TemporaryDirectory() as folder:
        compare = [sys.executable, "-m", "ift_peft", "compare", *runs, "--output", folder]
        subprocess.run(compare, check=True)
        write_result(f"techniques_{name}", json.loads((Path(folder) / "comparison.json").read_text("utf-8")))
        shutil.copy(Path(folder) / "comparison.svg", RESULTS / f"techniques_{name}.svg")


if __name__ == "__main__":
    typer.run(main)
