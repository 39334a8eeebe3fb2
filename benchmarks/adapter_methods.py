"""What each adapter.method costs, what it works with, and what a short training of it scores.

    python -m benchmarks.adapter_methods NAME [section.key=value …] [--methods lora,dora,…]

One run of recipe sentiment for each method over nf4, alike but for it, and three steps over int8. Each adapter is
opened again and measured, and merged. Seconds for a token are relative to lora's. Written to
benchmarks/results/adapter_methods_NAME.json.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from benchmarks.record import write_result
from ift_peft.adapters.merge import merge
from ift_peft.errors import IftPeftError
from ift_peft.evaluate.run import evaluate_run
from ift_peft.infer.load import open_parts
from ift_peft.recipe import load_recipe
from ift_peft.reporter import Silent
from ift_peft.sections import Method
from ift_peft.train.run import train

SETTINGS = (
    "adapter.embeddings=false",
    "data.max_train_rows=640",
    "data.max_test_rows=200",
    "training.num_train_epochs=1",
    "training.warmup_steps=4",
    "evaluation.forgetting=false",
    "evaluation.unseen_instructions=null",
    "evaluation.perturbation=null",
)
# Vectors need larger steps than matrices.
OWN: dict[str, tuple[str, ...]] = {
    "vera": ("training.learning_rate=2e-2",),
    "ia3": ("training.learning_rate=2e-2",),
}
FEW = ("training.max_steps=3", "data.max_train_rows=48", "data.max_test_rows=8")


def measured(method: str, overrides: list[str], root: Path) -> dict[str, Any]:
    """One method's row of the table."""
    own = [*SETTINGS, *OWN.get(method, ()), *overrides, f"adapter.method={method}"]
    run = train(load_recipe("sentiment", own), root=root, reporter=Silent())
    manifest, scores = run.read("manifest.json"), run.read("scores.json")
    merged = merge(open_parts(run), output=root / f"merged-{method}", dtype="float32", reporter=Silent())
    shutil.rmtree(merged.folder)
    return {
        "method": method,
        "trained": manifest["parameters"]["trained"],
        "adapter_bytes": (run.adapter / "adapter_model.safetensors").stat().st_size,
        "tokens_per_second": manifest["tokens_per_second"],
        "base": scores["base"]["accuracy"],
        "accuracy": scores["adapter"]["accuracy"],
        "reloaded_scores_equal": evaluate_run(run, data=None, reporter=Silent())["adapter"] == scores["adapter"],
        "merge_max_logit_difference": merged.max_logit_difference,
        "int8": over_int8(own, root),
        "learning_rate": run.recipe().training["learning_rate"],
    }


def over_int8(overrides: list[str], root: Path) -> str:
    """`yes`, or what it is refused with."""
    try:
        train(load_recipe("sentiment", [*overrides, *FEW, "base.quantization=int8"]), root=root, reporter=Silent())
    except IftPeftError as error:
        return f"refused: {error.expected}"
    return "yes"


def main(
    name: Annotated[str, typer.Argument(help="Name of the result.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    methods: Annotated[str, typer.Option(help="Methods, with commas.")] = ",".join(get_args(Method)),
    runs_dir: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/adapter_methods"),
) -> None:
    """Train, open, merge with each method and print the table."""
    rows = []
    for method in methods.split(","):
        rows.append(measured(method, overrides or [], runs_dir))
        typer.echo(f"{method}: {rows[-1]}", err=True)
    first = rows[0]["tokens_per_second"]
    typer.echo(
        f"| method | trained | adapter, kB | time, {rows[0]['method']} = 1 | nf4 | int8 | opened again | "
        "merged, logits off by | learning rate | accuracy |\n|---|--:|--:|--:|---|---|---|--:|--:|---|"
    )
    for row in rows:
        score = row["accuracy"]
        typer.echo(
            f"| {row['method']} | {row['trained']:,} | {row['adapter_bytes'] / 1e3:,.0f} | "
            f"{first / row['tokens_per_second']:.2f} | yes | {row['int8'].partition(':')[0]} | "
            f"{'same scores' if row['reloaded_scores_equal'] else 'other scores'} | "
            f"{row['merge_max_logit_difference']:.1e} | {row['learning_rate']:g} | "
            f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}] |"
        )
    path = write_result(f"adapter_methods_{name}", {"settings": SETTINGS, "overrides": overrides, "runs": rows})
    typer.echo(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
