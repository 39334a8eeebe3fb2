"""Runs whose adapters may be combined: what they must share, and the recipe and rows that they have together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peft import LoraConfig

from ift_peft.data.row import Row
from ift_peft.data.rows import from_saved
from ift_peft.errors import Faults, IftPeftError, RunError, raise_all
from ift_peft.evaluate.arms import read_lines, require_same_rows, short
from ift_peft.infer.load import Parts, rows_trained_on
from ift_peft.recipe import Recipe, validate
from ift_peft.reporter import Reporter
from ift_peft.sections import Data, Source
from ift_peft.yaml_source import YamlSource

# Settings of LoRA in which adapters may differ and still be combined; in all others they must be plain LoRA.
FREE = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("modules_to_save", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_type"),
    *("auto_mapping", "peft_version", "fan_in_fan_out", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
Text = str | tuple[str, ...]


def check_parents(parents: Sequence[Parts]) -> None:
    """Raises `Faults` or `RunError` naming all in which runs differ that their adapters cannot be combined over."""
    first, faults = parents[0], []
    told = [(parts, _facts(parts)) for parts in parents]
    for parts, facts in told[1:]:
        faults += [
            RunError(
                expected=f"the {what} of {short(first.run)}: {expected}",
                found=f"{found} in {short(parts.run)}",
                fix="combine adapters of one base and form; answers of different bases: ift predict --ensemble",
            )
            for what, expected in told[0][1].items()
            if (found := facts.get(what, "none")) != expected
        ]
    faults += [fault for parts in parents for fault in _not_plain(parts)]
    raise_all(faults)


def _facts(parts: Parts) -> dict[str, str]:
    """What must be equal, by name, as it is told."""
    recipe = parts.recipe
    facts = {
        "base": f"{parts.location.public_name} ({parts.location.fingerprint()[:12]})",
        "chat template": parts.renderer.template_hash[:12],
        "base.head": recipe.base.head,
        "modules trained whole": ", ".join(recipe.adapter.modules_to_save) or "none",
    }
    if recipe.base.head == "sequence-classification":
        facts["data.labels"] = ", ".join(recipe.data.label_words)
        facts["seed that drew the head"] = str(recipe.seed)
    return facts


def _not_plain(parts: Parts) -> list[RunError]:
    config = adapter_config(parts)
    if parts.recipe.adapter.method == "loftq":  # a sum would bring what quantisation took twice, or in part
        found = ["loftq, which makes up for what quantisation took from the base,"]
    elif config.get("peft_type") != "LORA":
        found = [f"peft_type {config.get('peft_type')}"]
    else:
        plain = LoraConfig().to_dict()
        found = [
            f"{key} {value}"
            for key, value in config.items()
            if key not in FREE and value != plain.get(key) and value not in (None, False, [], {})
        ]
    return [
        RunError(expected="plain LoRA, whose deltas add up", found=f"{one} in {short(parts.run)}", fix="leave it out")
        for one in found
    ]


def adapter_config(parts: Parts) -> dict[str, Any]:
    """PEFT's configuration of the run's adapter. Raises `RunError` where it has none."""
    try:
        content = json.loads((parts.run.adapter / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            expected=f"adapter/adapter_config.json in {parts.run.path}", found=str(error), fix="train again"
        ) from None
    assert isinstance(content, dict)
    return content


def same_task(parents: Sequence[Parts]) -> bool:
    """Whether all runs have the same section `data`, and so the same held-out rows."""
    return all(parts.recipe.data == parents[0].recipe.data for parts in parents)


def union_recipe(parents: Sequence[Parts], *, name: str, description: str) -> Recipe:
    """The recipe of the combined adapter: that of runs with one section `data`, else a mix of theirs.

    `training` and `loss` hold what all have in common. Raises `RunError` for a run on several sources that are one
    task, beside other runs.
    """
    recipes = [parts.recipe for parts in parents]
    values = recipes[0].model_dump(mode="json")
    dumps = [recipe.model_dump(mode="json") for recipe in recipes]
    values |= {"name": name, "description": description, "tune": None}
    values["training"] = {
        key: value
        for key, value in dumps[0]["training"].items()
        if all(key in one["training"] and one["training"][key] == value for one in dumps)
    }
    if any(one["loss"] != dumps[0]["loss"] for one in dumps):
        del values["loss"]
    kept = ("r", "lora_alpha", "target_modules", "modules_to_save")
    values["adapter"] = {key: values["adapter"][key] for key in kept}  # the result is plain LoRA
    values["adapter"]["embeddings"] = any(recipe.adapter.embeddings for recipe in recipes)
    if not same_task(parents):
        values["data"] = _mix(parents)
        values["validation"] = None
        values["evaluation"] |= {"unseen_instructions": None, "perturbation": None, "metrics": (), "target": {}}
    return validate(YamlSource("the combined recipe", values))


def _mix(parents: Sequence[Parts]) -> dict[str, Any]:
    wrong = [parts for parts in parents if parts.recipe.data.sources and not parts.recipe.data.mixed]
    raise_all(
        [
            RunError(
                expected="runs on one source, or on a mix of tasks, where sections data differ",
                found=f"several sources that are one task in {short(parts.run)}",
                fix="leave it out, or combine it with runs of the same data",
            )
            for parts in wrong
        ]
    )
    classifier = parents[0].recipe.base.head == "sequence-classification"
    sources: list[dict[str, Any]] = []
    for parts, name in zip(parents, parent_names(parents), strict=True):
        data, section = parts.recipe.data, parts.recipe.evaluation
        for number, (part, weight) in enumerate(data.by_source()):
            source = data.sources[number] if data.sources else None
            own = {key: value for key, value in part.model_dump(mode="json").items() if key in Source.model_fields}
            own["weight"] = weight
            if classifier:
                sources.append({**own, "labels": None})
                continue
            own["name"] = name if source is None else f"{name}-{source.called}"
            metrics = section.metrics if source is None or source.metrics is None else source.metrics
            own["metrics"] = None if part.label_words else metrics
            sources.append(own)
    labels = parents[0].recipe.data.model_dump(mode="json")["labels"] if classifier else None
    return Data.model_validate({"sources": sources, "labels": labels}).model_dump(mode="json")


def parent_names(parents: Sequence[Parts]) -> list[str]:
    """The recipe's name of each run, numbered where several share one."""
    names = [parts.recipe.name for parts in parents]
    return [f"{name}-{number}" if names.count(name) > 1 else name for number, name in enumerate(names, start=1)]


def union_rows(parents: Sequence[Parts], rows: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows of each run as those of the mix: their sources are numbered on."""
    if same_task(parents):
        return list(rows[0])
    found, offset = [], 0
    for parts, own in zip(parents, rows, strict=True):
        found += [replace(row, source=offset + row.source) for row in own]
        offset += max(1, len(parts.recipe.data.sources))
    return found


def union_held_out(parents: Sequence[Parts], reporter: Reporter) -> tuple[list[Row], list[str]]:
    """The held-out rows of all runs, without those that another of them was trained on; and notes on these.

    Raises `RunError` where runs of one section `data` hold out different rows, or where none are left of a run.
    """
    if same_task(parents):
        require_same_rows([parts.run for parts in parents])
        return saved_rows(parents[0], "test.jsonl"), []
    kept, notes = without_trained(parents, [saved_rows(parts, "test.jsonl") for parts in parents], "held-out")
    for note in notes:
        reporter.note(note)
    raise_all(
        [
            RunError(
                expected=f"held-out rows of {short(parts.run)} that no other run was trained on",
                found="none",
                fix="leave that run, or the other, out",
            )
            for parts, own in zip(parents, kept, strict=True)
            if not own
        ]
    )
    return union_rows(parents, kept), notes


def without_trained(
    parents: Sequence[Parts], rows: Sequence[list[Row]], kind: str
) -> tuple[list[list[Row]], list[str]]:
    """The rows of each run without those whose text another run was trained on, and notes on what was left out."""
    trained, notes = [], []
    for parts in parents:
        try:
            trained.append({_text(row) for row in rows_trained_on(parts)})
        except (IftPeftError, Faults, OSError) as error:
            trained.append(set())
            reason = str(error).splitlines()[0]
            notes.append(f"not checked whether {short(parts.run)} was trained on {kind} rows of the others: {reason}")
    kept = []
    for number, own in enumerate(rows):
        others = set[Text]().union(*(texts for at, texts in enumerate(trained) if at != number))
        left = [row for row in own if _text(row) not in others]
        if len(left) < len(own):
            out = len(own) - len(left)
            notes.append(f"{out} {kind} rows of {short(parents[number].run)} left out: another run was trained on them")
        kept.append(left)
    return kept, notes


def _text(row: Row) -> Text:
    return row.text if row.text is not None else tuple(one["content"] for one in row.prompt if one["role"] == "user")


def saved_rows(parts: Parts, name: str) -> list[Row]:
    """The rows of one of the run's files."""
    return [from_saved(line) for line in read_lines(parts.run, name)]
