"""Runs grouped into arms: what was trained alike but for its seeds is one arm, named by what sets it apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ift_peft.errors import RunError
from ift_peft.run_dir import RunDir

Settings = dict[str, Any]
Key = tuple[str, ...]
# What the manifest adds to the recipe: files may change under their names.
FOUND = {
    ("base", "files"): "base_fingerprint",
    ("base", "template"): "template_sha256",
    ("data", "rows"): "train_sha256",
    ("loss", "teacher"): "teacher_fingerprint",
}
LONGEST_VALUE = 32


@dataclass(frozen=True)
class Arm:
    """Runs of equal settings, each with seeds of its own."""

    name: str
    runs: tuple[RunDir, ...]


def group(runs: Sequence[RunDir]) -> tuple[list[Arm], list[str]]:
    """The arms of `runs` in the order they were given, and notes on runs left out.

    Of several runs with the same settings and seeds the newest is kept: a repeated run is no further seed.
    """
    settings: dict[str, Settings] = {}
    members: dict[str, dict[tuple[Any, ...], RunDir]] = {}
    notes = []
    for run in runs:
        values, seeds = _settings(run)
        key = json.dumps(values, sort_keys=True)
        settings.setdefault(key, values)
        arm = members.setdefault(key, {})
        if seeds in arm:
            older, newer = sorted((arm[seeds], run), key=lambda one: str(one.read("manifest.json").get("started", "")))
            notes.append(f"{short(older)} left out: {short(newer)} has the same settings and seeds")
            run = newer
        arm[seeds] = run
    names = _names(list(settings.values()))
    return [Arm(name, tuple(arm.values())) for name, arm in zip(names, members.values(), strict=True)], notes


def short(run: RunDir) -> str:
    """A run as recipe/time-id."""
    return "/".join(run.path.parts[-2:])


def _settings(run: RunDir) -> tuple[Settings, tuple[Any, ...]]:
    """What was trained, without what only says how it was measured or found, and the seeds it was trained with."""
    values = run.recipe().model_dump(mode="json")
    del values["description"], values["evaluation"], values["tune"]
    data = values["data"]
    sources = data.get("sources") or ()
    for source in sources:
        del source["name"], source["metrics"]
    owners = [(values["training"], "seed"), (values["training"], "data_seed")]
    owners += [(section, "seed") for section in (data.get("instructions"), data.get("augment")) if section]
    owners += [(source["instructions"], "seed") for source in sources if source.get("instructions")]
    seeds = tuple(section.pop(key, None) for section, key in owners)
    manifest = run.read("manifest.json")
    inputs, combined = manifest.get("inputs", {}), dict(manifest.get("combined") or {})
    if combined:  # of adapters that were trained elsewhere
        seeds += (combined.pop("seed"),)
        members = [f"{one['run']} {one['adapter_sha256'][:8]}" for one in manifest["combined_from"]]
        values["combined"] = {**combined, "of": members}
    for (section, key), recorded in FOUND.items():
        # rows that are drawn or phrased by a seed differ between the runs of one arm
        by_seed = key == "rows" and bool(data.get("instructions") or data.get("augment") or sources)
        values[section][f"({key})"] = None if by_seed else str(inputs.get(recorded))[:8]
    return values, seeds


def _names(settings: Sequence[Settings]) -> list[str]:
    """The recipe's name of each, made unique by the settings in which those of one name differ."""
    names = []
    for values in settings:
        alike = [other for other in settings if other["name"] == values["name"]]
        names.append(_name(values, alike))
    repeats = Counter(names)
    return [f"{name} {index}" if repeats[name] > 1 else name for index, name in enumerate(names, start=1)]


def _name(values: Settings, alike: Sequence[Settings]) -> str:
    """Recipe's name and settings; files that changed are told only where no setting differs."""
    keys = list(_differing(alike))
    told = [key for key in keys if not key[-1].startswith("(")] or keys
    parts = [f"{'.'.join(key)}={_shown(_at(values, key))}" for key in told]
    return f"{values['name']} ({', '.join(parts)})" if parts else str(values["name"])


def _differing(values: Sequence[Any], at: Key = ()) -> Iterator[Key]:
    """The keys, as deep as all of `values` have sections, whose values are not all equal."""
    if all(value == values[0] for value in values):
        return
    if not all(isinstance(value, dict) for value in values):
        yield at
        return
    for key in dict.fromkeys(key for value in values for key in value):
        yield from _differing([value.get(key) for value in values], (*at, key))


def _at(values: Any, key: Key) -> Any:
    for part in key:
        values = values.get(part)
    return values


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, dict):
        return "set"
    if isinstance(value, list):
        return f"{len(value)} entries"
    if isinstance(value, bool):
        return str(value).lower()
    text = Path(value).name if isinstance(value, str) and value.startswith("/") else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def require_same_rows(runs: Sequence[RunDir]) -> None:
    """Raises `RunError` naming the runs that were measured on other held-out rows than the first."""
    first = runs[0]
    others = [run for run in runs[1:] if not _same_rows(first, run)]
    if others:
        raise RunError(
            expected="runs measured on the same held-out rows",
            found=f"other rows than those of {short(first)} in {', '.join(map(short, others))}",
            fix="leave them out, or train again with equal data.test, data.seed, data.test_size, data.max_test_rows",
        )


def _same_rows(one: RunDir, other: RunDir) -> bool:
    """Rendered alike by the same base; or the same answers to the same texts, however they were asked about."""
    inputs = [run.read("manifest.json").get("inputs", {}) for run in (one, other)]
    keys = ("base_fingerprint", "template_sha256", "test_sha256")
    if all(key in inputs[0] and inputs[0][key] == inputs[1].get(key) for key in keys):
        return True
    rows = [read_lines(run, "test.jsonl") for run in (one, other)]
    return len(rows[0]) == len(rows[1]) and all(_same_row(*pair) for pair in zip(*rows, strict=True))


def _same_row(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether answer and text are equal; a text may have been cut at its end to fit, at the same place of a file.

    Rows without a text of their own are told by their user messages. Where even these differ, as they do between
    recipes that ask differently, the same line of a file of the same name counts: with all answers equal as well,
    another file of that name is out of the question.
    """
    if one["messages"][-1] != other["messages"][-1]:
        return False
    asked = [[m["content"] for m in row["messages"] if m["role"] == "user"] for row in (one, other)]
    first, second = one.get("text"), other.get("text")
    if asked[0] == asked[1] or (first is not None and first == second):
        return True
    origins = [str(row.get("where", "")).rpartition("/")[2] for row in (one, other)]
    if not origins[0] or origins[0] != origins[1]:
        return False
    return first is None or second is None or first.startswith(second) or second.startswith(first)


def read_lines(run: RunDir, name: str) -> list[dict[str, Any]]:
    """The objects of one of the run's JSON-lines files. Raises `RunError` where it is missing or broken."""
    try:
        return run.read_lines(name)
    except (OSError, ValueError) as error:
        raise RunError(
            expected=f"{name} in {run.path}", found=str(error), fix="train again, or leave this run out"
        ) from None
