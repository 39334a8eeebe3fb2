"""Whether llama.cpp says what the run says: every GGUF form and type of a short run, compared token by token.

    python -m benchmarks.export_proof NAME RECIPE [section.key=value …]

A recipe is trained with the overrides given, exported in all types as a merged model and as an adapter, and each is run
by llama-cpp-python beside the model in transformers: tokens of held-out prompts and of probes, greedy answers, logits
(ift_peft/adapters/export/proof.py). Written to benchmarks/results/export_NAME.json.
"""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.record import write_result
from ift_peft.adapters.export.gguf_file import Outtype
from ift_peft.adapters.export.run import Target, export
from ift_peft.adapters.merge import merge
from ift_peft.infer.load import open_parts
from ift_peft.recipe import load_recipe
from ift_peft.reporter import Silent
from ift_peft.train.run import train

FORMS: tuple[tuple[Target, Outtype], ...] = (
    ("gguf", "f32"),
    ("gguf", "f16"),
    ("gguf", "bf16"),
    ("gguf", "q8_0"),
    ("gguf-adapter", "f32"),
    ("gguf-adapter", "f16"),
)


def measure(recipe: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Train, merge once, export every form; what each proof found."""
    run = train(load_recipe(recipe, overrides), root=folder / "runs", reporter=Silent())
    parts = open_parts(run)
    merge(parts, output=run.path / "merged", dtype="float32", reporter=Silent())
    found = []
    for to, outtype in FORMS:
        done = export(parts, to=to, outtype=outtype, output=folder / f"{to}-{outtype}", reporter=Silent())
        found.append({"to": to, **done.checked})
    named = [one for one in overrides if not one.startswith("base.model=")]  # a folder of this machine, it may be
    settings = {"recipe": parts.recipe.name, "base": parts.location.public_name, "overrides": named}
    return {**settings, "forms": found}


def main(
    name: Annotated[str, typer.Argument(help="Name of the result.")],
    recipe: Annotated[str, typer.Argument(help="A recipe whose base is exported.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """Export a short run as GGUF and compare llama.cpp with transformers."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(recipe, overrides or [], Path(folder))
    result["packages"] = {package: metadata.version(package) for package in ("gguf", "llama_cpp_python")}
    typer.echo(f"{result['recipe']} over {result['base']}")
    for form in result["forms"]:
        proof = form["proof"]
        if proof is None:
            raise typer.BadParameter(form["why_no_proof"])
        typer.echo(
            f"  {form['to']:<13}{form['outtype']:<5} prompts {proof['prompts_equal']}/{proof['prompts']}  "
            f"probes {proof['probes_equal']}/{proof['probes']}  tokens {proof['tokens_equal']}/{proof['tokens']}  "
            f"logits {proof['max_logit_difference']:.1e}"
        )
    typer.echo(f"written to {write_result(f'export_{name}', result)}")


if __name__ == "__main__":
    typer.run(main)
