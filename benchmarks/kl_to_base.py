"""What the weight of loss.kl_to_base does to a task and to general text.

    python -m benchmarks.kl_to_base NAME RECIPE [section.key=value …] [--weights 0,0.1,0.5,2]

One run for each weight, alike but for it. The table has the adapter's score on the held-out rows, and how much the
loss on general text rose. Written to benchmarks/results/kl_to_base_NAME.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.record import write_result
from ift_peft.console import ConsoleReporter
from ift_peft.recipe import load_recipe
from ift_peft.run_dir import RunDir
from ift_peft.train.run import train


def told(run: RunDir, weight: float) -> dict[str, Any]:
    """The scores of one run that the table shows."""
    scores = run.read("scores.json")
    metric = next(iter(scores["adapter"]))
    return {
        "kl_to_base": weight,
        "metric": metric,
        "base": scores["base"][metric],
        "adapter": scores["adapter"][metric],
        "forgetting": scores["forgetting"]["change"]["loss"],
        "seconds": run.read("manifest.json")["seconds"],
    }


def shown(part: dict[str, float], sign: str = "") -> str:
    return f"{part['value']:{sign}.3f} [{part['low']:{sign}.3f}, {part['high']:{sign}.3f}]"


def main(
    name: Annotated[str, typer.Argument(help="Name of the result.")],
    recipe: Annotated[str, typer.Argument(help="A recipe whose run measures forgetting.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    weights: Annotated[str, typer.Option(help="Weights of the divergence, with commas.")] = "0,0.1,0.5,2",
    runs_dir: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/kl_to_base"),
) -> None:
    """Train a recipe with each weight and compare."""
    results = []
    for weight in map(float, weights.split(",")):
        one = load_recipe(recipe, [*(overrides or ()), f"loss.kl_to_base={weight}"])
        results.append(told(train(one, root=runs_dir, reporter=ConsoleReporter()), weight))
    typer.echo(f"| kl_to_base | {results[0]['metric']} | loss on general text |\n|---|---|---|")
    for row in results:
        typer.echo(f"| {row['kl_to_base']:g} | {shown(row['adapter'])} | {shown(row['forgetting'], '+')} |")
    typer.echo(f"written to {write_result(f'kl_to_base_{name}', {'overrides': overrides, 'runs': results})}")


if __name__ == "__main__":
    typer.run(main)
