"""Adapters of several runs combined into one: a run like any other, measured on what its parents hold out."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ift_peft.adapters.parents import (
    check_parents,
    same_task,
    union_held_out,
    union_recipe,
    union_rows,
)
from ift_peft.adapters.weight_search import TRAINED_ON, SearchRows, Tried, search, search_rows
from ift_peft.adapters.weighted import Combination, add_combined, own_weights
from ift_peft.data.row import Row
from ift_peft.data.rows import to_saved
from ift_peft.durable import write_atomically
from ift_peft.errors import IftPeftError, RunError, first_line, raise_all
from ift_peft.evaluate.arms import short
from ift_peft.evaluate.run import evaluate_run
from ift_peft.infer.load import Parts, load_members, open_parts, rows_trained_on
from ift_peft.model.quiet import quiet
from ift_peft.recipe import Recipe
from ift_peft.report.card import adapter_card
from ift_peft.report.write import write_report
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir, create_run
from ift_peft.run_ending import ending
from ift_peft.sections import Adapter
from ift_peft.stages import PRUNING, Method

DENSITY = 0.5


@dataclass(frozen=True)
class Asked:
    """What is asked of a combination; None: weights of a mean, or those that the search finds, and density 0.5."""

    method: Method
    weights: tuple[float, ...] | None = None
    density: float | None = None
    rank: int | None = None
    seed: int = 0
    trials: int | None = None
    """Search by this many; None: no search."""


def combine(runs: Sequence[RunDir], asked: Asked, *, name: str | None, root: Path, reporter: Reporter) -> RunDir:
    """A run below `root` with the adapters of `runs` combined into one, measured on the rows that they hold out.

    Raises `RunError` or `Faults` where the runs are not of one base, chat template and form of adapter, and where what
    is asked of them does not fit together.
    """
    how = _combination(runs, asked)
    parents = [open_parts(run) for run in runs]
    check_parents(parents)
    named = name or "-".join(dict.fromkeys(("combined", *(parts.recipe.name for parts in parents))))
    recipe = union_recipe(parents, name=named, description=_description(parents, how))
    found = search_rows(parents, seed=how.seed) if asked.trials else None
    started = time.monotonic()
    model, names, notes = load_members(parents)
    tried: list[Tried] = []
    if found is not None and asked.trials:
        for note in (*found.notes, f"searching by {len(found.rows)} of {found.kind}"):
            reporter.note(note)
        tried = search(
            model, names, recipe, parents[0].renderer, found.rows, start=how, trials=asked.trials, reporter=reporter
        )
        how = tried[0].how
        recipe = recipe.model_copy(update={"description": _description(parents, how)})
    left_out = add_combined(model, names, how, name="combined")
    if left_out > 1e-4:
        reporter.note(f"the rank of the result leaves out {100 * left_out:.1f} % of the combined weights (squared)")
    recipe = _with_rank(recipe, model.peft_config["combined"])
    rows, row_notes = union_held_out(parents, reporter)
    run = create_run(recipe, root)
    with ending(run, since=started):
        _write(run, parents, model, how, rows, left_out=left_out, notes=[*notes, *row_notes])
        if found is not None:
            run.write("search.json", _search_json(found, tried, how))
        del model
        scores = evaluate_run(run, data=None, reporter=reporter, keep=True)
        run.write("scores.json", scores)
        _write_card(run, parents, recipe, how, scores)
    write_report(run)
    return run


def _combination(runs: Sequence[RunDir], asked: Asked) -> Combination:
    faults: list[IftPeftError] = []
    if len(runs) < 2:
        faults.append(RunError(expected="at least two runs", found=str(len(runs)), fix="name more (ift runs)"))
    if asked.weights is not None and len(asked.weights) != len(runs):
        faults.append(
            RunError(
                expected=f"a weight for each of {len(runs)} runs",
                found=f"{len(asked.weights)} weights",
                fix="give --weights in the order of the runs",
            )
        )
    if asked.weights is not None and not any(asked.weights):
        faults.append(RunError(expected="a weight other than 0", found="none", fix="change --weights"))
    if asked.density is not None and asked.method not in PRUNING:
        faults.append(
            RunError(
                expected=f"--density with {', '.join(PRUNING)}", found=f"it with {asked.method}", fix="leave it out"
            )
        )
    if asked.density is not None and not 0 < asked.density <= 1:
        faults.append(
            RunError(expected="a density above 0, up to 1", found=f"{asked.density:g}", fix="change --density")
        )
    if asked.rank is not None and asked.method == "linear":
        faults.append(
            RunError(
                expected="no --rank with linear, which is exact at the sum of the ranks",
                found=str(asked.rank),
                fix="use --method svd, the same sum at a rank of your choice",
            )
        )
    raise_all(faults)
    density = (asked.density or DENSITY) if asked.method in PRUNING else None
    weights = asked.weights or own_weights(asked.method, len(runs))
    return Combination(asked.method, weights, density, asked.rank, asked.seed)


def _description(parents: Sequence[Parts], how: Combination) -> str:
    weights = ", ".join(f"{weight:g} x {short(parts.run)}" for weight, parts in zip(how.weights, parents, strict=True))
    pruned = f" at density {how.density:g}" if how.density is not None else ""
    return f"combined by {how.method}{pruned} of {weights}"


def _with_rank(recipe: Recipe, config: Any) -> Recipe:
    """The recipe with the adapter that the result is: plain LoRA, whatever the methods of its parents."""
    modules, own = config.target_modules, recipe.adapter
    targets = modules if isinstance(modules, str) else tuple(sorted(modules))
    adapter = Adapter(
        r=config.r,
        lora_alpha=config.r,
        target_modules="all-linear" if own.target_modules == "all-linear" else targets,
        embeddings=own.embeddings,
        modules_to_save=own.modules_to_save,
    )
    return recipe.model_copy(update={"adapter": adapter})


def _write(
    run: RunDir,
    parents: Sequence[Parts],
    model: Any,
    how: Combination,
    rows: Sequence[Row],
    *,
    left_out: float,
    notes: list[str],
) -> None:
    """Everything of the run that is known before it is measured."""
    first = parents[0]
    manifests = [parts.run.read("manifest.json") for parts in parents]
    run.write("golden.json", first.run.read("golden.json"))
    run.write_lines("test.jsonl", [to_saved(row) for row in rows])
    notes = [*notes, *_write_training_rows(run, parents)]
    lengths = [parts.max_length for parts in parents]
    known = [length for length in lengths if length is not None]
    trained = [manifest["rows"]["train"] for manifest in manifests]
    counts = trained[0] if same_task(parents) else {key: sum(int(one[key]) for one in trained) for key in _COUNTS}
    parameters = sum(p.numel() for name, p in model.named_parameters() if ".combined." in f"{name}.")
    members = [p.numel() for name, p in model.named_parameters() if not _of_an_adapter(model, name)]
    run.update_manifest(
        inputs={
            "base_fingerprint": first.location.fingerprint(),
            "template_sha256": first.renderer.template_hash,
            **_common(manifests, "train_sha256"),
            **(_common(manifests, "test_sha256") if same_task(parents) else {}),
        },
        base=manifests[0]["base"],
        template=first.renderer.origin,
        generation_prompt=first.renderer.generation_prompt,
        max_length=max(known) if len(known) == len(lengths) else None,
        rows={"train": counts},
        parameters={"trained": parameters, "all": sum(members) + parameters},
        combined={**how.to_json(), "left_out_by_rank": round(left_out, 6)},
        combined_from=parents_of(parents),
        notes=notes,
    )
    _save(run, first, model)


_COUNTS = ("rows", "variants", "tokens", "supervised_tokens", "truncated", "dropped")


def _common(manifests: Sequence[dict[str, Any]], key: str) -> dict[str, str]:
    """An input of the runs by hash, where it is the same in all."""
    found = {manifest["inputs"].get(key) for manifest in manifests}
    return {key: found.pop()} if len(found) == 1 and None not in found else {}


def _of_an_adapter(model: Any, name: str) -> bool:
    return any(f".{adapter}." in f"{name}." for adapter in model.peft_config)


def _write_training_rows(run: RunDir, parents: Sequence[Parts]) -> list[str]:
    """What `ift explain` looks for rows in; notes on what is not there."""
    if same_task(parents):
        for name in ("train.jsonl", "validation.jsonl"):
            if (parents[0].run.path / name).is_file():
                shutil.copy(parents[0].run.path / name, run.path / name)
        return []
    try:
        rows = union_rows(parents, [list(rows_trained_on(parts)) for parts in parents])
    except (IftPeftError, OSError) as error:
        return [f"training rows of the runs can no longer be read: {first_line(error)}"]
    run.write_lines("train.jsonl", [to_saved(row) for row in rows])
    return []


def parents_of(parents: Sequence[Parts]) -> list[dict[str, Any]]:
    """The runs, each with the hashes of its adapter and recipe, as the manifest has them under `combined_from`."""
    return [_parent(parts) for parts in parents]


def _parent(parts: Parts) -> dict[str, Any]:
    weights = parts.run.adapter / "adapter_model.safetensors"
    return {
        "run": short(parts.run),
        "adapter_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "recipe_sha256": hashlib.sha256((parts.run.path / "recipe.yaml").read_bytes()).hexdigest(),
    }


def _save(run: RunDir, first: Parts, model: Any) -> None:
    config = model.peft_config["combined"]
    config.base_model_name_or_path = first.location.public_name
    with quiet():
        model.save_pretrained(run.path / "saved", selected_adapters=["combined"], save_embedding_layers=False)
    (run.path / "saved" / "combined").rename(run.adapter)
    shutil.rmtree(run.path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(first.run.adapter, trust_remote_code=False, local_files_only=True)
    tokenizer.save_pretrained(run.adapter)
    run.update_manifest(adapter_sha256=run.adapter_hashes())


def _write_card(
    run: RunDir, parents: Sequence[Parts], recipe: Recipe, how: Combination, scores: dict[str, Any]
) -> None:
    base, told = parents[0].location.public_name, _description(parents, how)
    write_atomically(run.adapter / "README.md", adapter_card(recipe, base=base, scores=scores, rows=0, combined=told))
    for path in run.adapter.iterdir():
        path.chmod(0o644)  # safetensors writes 0600


def _search_json(found: SearchRows, tried: Sequence[Tried], how: Combination) -> dict[str, Any]:
    return {
        "rows": len(found.rows),
        "chosen_by": found.kind,
        "trained_on": found.kind == TRAINED_ON,
        "loss": "nats per row of labels or token of answers, the mean over tasks",
        "seed": how.seed,
        "tried": [one.to_json() for one in tried],
    }
