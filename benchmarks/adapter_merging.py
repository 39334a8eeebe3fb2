"""Two adapters of one base, each trained on one language, made into one in every way that there is.

    python -m benchmarks.adapter_merging NAME [section.key=value …] [--rows 1200]

The reviews that come along, Chinese and English apart, and an adapter trained on both together. Each adapter, each
combination and each ensemble is measured on the held-out rows of both languages; searched combinations are chosen by
training rows. Beside the methods of `ift combine`, what PEFT's `add_weighted_adapter` makes of A and B apart. Written
to benchmarks/results/adapter_merging_NAME.json.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer
from peft.tuners.lora.layer import LoraLayer

from benchmarks.record import write_result
from ift_peft.adapters.parents import union_recipe, union_rows
from ift_peft.adapters.weight_search import search, search_rows
from ift_peft.adapters.weighted import Combination, add_combined, own_weights
from ift_peft.console import ConsoleReporter
from ift_peft.data.row import Row
from ift_peft.evaluate.intervals import Floats, wilson
from ift_peft.evaluate.metrics import Resampling, classification_change
from ift_peft.infer.ensemble import together
from ift_peft.infer.likelihood import label_probabilities
from ift_peft.infer.load import Parts, held_out_rows, load_members, open_parts
from ift_peft.recipe import load_recipe, recipes_root
from ift_peft.stages import PRUNING, Kind, Method
from ift_peft.train.run import train

LANGUAGES = ("zh", "en")
SEARCHED: tuple[Method, ...] = ("linear", "ties")
RANK = 32  # of every combination: the sum of the two
SAME = (
    "evaluation.forgetting=false",
    "evaluation.unseen_instructions=null",
    "evaluation.perturbation=null",
    "evaluation.bootstrap_samples=200",
)


def write_rows(folder: Path, rows: int) -> None:
    """`rows` of each language for training, and all held-out ones, each language apart and both together."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        content = (recipes_root() / "data" / "reviews" / f"{part}.jsonl").read_text("utf-8").splitlines()
        both: list[str] = []
        for language in LANGUAGES:
            own = [line for line in content if json.loads(line)["language"] == language]
            own = random.Random(0).sample(own, rows) if part == "train" else own
            (folder / f"{language}-{part}.jsonl").write_text("\n".join(own) + "\n", "utf-8")
            both += own
        (folder / f"both-{part}.jsonl").write_text("\n".join(both) + "\n", "utf-8")


def trained(name: str, folder: Path, overrides: list[str], root: Path) -> Parts:
    files = [f"name=reviews-{name}", *(f"data.{part}={folder / f'{name}-{part}.jsonl'}" for part in ("train", "test"))]
    return open_parts(
        train(load_recipe("sentiment", [*files, *SAME, *overrides]), root=root, reporter=ConsoleReporter())
    )


def distance(model: Any, one: str, other: str) -> float:
    """How far the deltas of two adapters lie apart, as a share of the size of the second's (Frobenius norm)."""
    apart = size = 0.0
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            first, second = layer.get_delta_weight(one), layer.get_delta_weight(other)
            apart += float((first - second).square().sum())
            size += float(second.square().sum())
    return float(np.sqrt(apart / size))


def told(arms: dict[str, Floats], rows: list[Row], labels: tuple[str, ...]) -> dict[str, Any]:
    """Accuracy of each arm by language, and its paired change from the better of the two adapters on all rows."""
    truth = np.array([labels.index(row.answer) for row in rows])
    hits = {name: found.argmax(axis=1) == truth for name, found in arms.items()}
    best = max(LANGUAGES, key=lambda language: hits[language].mean())
    result: dict[str, Any] = {"better_of_the_two": best, "arms": {}}
    for name, found in arms.items():
        own = {
            language: wilson(int(hits[name][part].sum()), int(part.sum()), confidence=0.95).to_json()
            for number, language in enumerate(LANGUAGES)
            if (part := np.array([row.source == number for row in rows])).any()
        }
        change = classification_change(
            truth.tolist(), arms[best].argmax(1).tolist(), found.argmax(1).tolist(), len(labels), Resampling()
        )
        result["arms"][name] = {**own, "change": change["accuracy"].to_json()}
    return result


def main(
    name: Annotated[str, typer.Argument(help="Name of the result.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    rows: Annotated[int, typer.Option(help="Training rows of each language.")] = 1200,
    trials: Annotated[int, typer.Option(help="Combinations that each search tries.")] = 12,
    runs_dir: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/adapter_merging"),
) -> None:
    """Train both adapters and one on all rows, combine and compare."""
    folder = runs_dir.resolve() / "data"
    write_rows(folder, rows)
    *parents, both = (trained(one, folder, overrides or [], runs_dir) for one in (*LANGUAGES, "both"))
    labels, renderer = parents[0].labels, parents[0].renderer
    held_out = union_rows(parents, [held_out_rows(parts).rows for parts in parents])
    model, names, _ = load_members([*parents, both])
    of = names[:2]

    def probabilities(adapter: str | None) -> Floats:
        prompts = [row.prompt for row in held_out]
        if adapter is None:
            with model.disable_adapter():
                return label_probabilities(model, renderer, prompts, labels, batch_size=32)
        model.set_adapter(adapter, inference_mode=True)
        return label_probabilities(model, renderer, prompts, labels, batch_size=32)

    arms = {"base": probabilities(None)}
    arms |= {arm: probabilities(adapter) for arm, adapter in zip((*LANGUAGES, "both"), names, strict=True)}
    facts: dict[str, Any] = {"left_out_by_rank": {}, "searched": {}}
    recipe = union_recipe(parents, name="searched", description="")
    chosen_by = search_rows(parents, seed=0)
    for method in get_args(Method):
        how = Combination(method, own_weights(method, 2), 0.5 if method in PRUNING else None, RANK)
        facts["left_out_by_rank"][method] = round(add_combined(model, of, how, name=method), 6)
        arms[method] = probabilities(method)
    for method in SEARCHED:
        how = Combination(method, own_weights(method, 2), 0.5 if method in PRUNING else None, RANK)
        tried = search(
            model, of, recipe, renderer, chosen_by.rows, start=how, trials=trials, reporter=ConsoleReporter()
        )
        facts["searched"][method] = tried[0].to_json()
        add_combined(model, of, tried[0].how, name=f"{method}-searched")
        arms[f"{method}, searched"] = probabilities(f"{method}-searched")
    for form in ("linear", "ties"):
        weights = list(own_weights(form, 2))
        with torch.no_grad():
            model.base_model.add_weighted_adapter(
                of, weights, f"peft-{form}", combination_type=form, density=0.5 if form == "ties" else None
            )
        arms[f"PEFT's {form}, A and B apart"] = probabilities(f"peft-{form}")
    facts["distance_of_pefts_linear_from_the_sum"] = round(distance(model, "peft-linear", "linear"), 4)
    for kind in get_args(Kind):
        arms[f"ensemble, {kind}"] = together(np.stack([arms[language] for language in LANGUAGES]), kind)
    result = told(arms, held_out, labels) | facts
    typer.echo(f"| | zh | en | change from {result['better_of_the_two']}, both |\n|---|---|---|---|")
    for arm, scores in result["arms"].items():
        cells = (f"{scores[language]['value']:.3f}" for language in LANGUAGES)
        change = "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**scores["change"])
        typer.echo(f"| {arm} | {' | '.join(cells)} | {change} |")
    typer.echo(json.dumps(facts, indent=1))
    settings = {"rows": rows, "trials": trials, "overrides": overrides}
    typer.echo(f"written to {write_result(f'adapter_merging_{name}', {'settings': settings, **result})}")


if __name__ == "__main__":
    typer.run(main)
