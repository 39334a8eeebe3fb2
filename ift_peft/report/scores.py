"""Scores as a report shows them: base beside adapter, each with its interval, and what the change says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ift_peft.evaluate.gates import CLASSIFICATION, LOWER_IS_BETTER
from ift_peft.recipe import Recipe

WHO = ("base", "adapter", "change")
LOWER = (*LOWER_IS_BETTER, "ece", "brier", "nll")
HIGHER = (*CLASSIFICATION, "exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL")


def number(value: float, *, signed: bool = False) -> str:
    """Three places, fewer for numbers above ten, with a real minus sign."""
    size = abs(value)
    places = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:{'+' if signed else ''},.{places}f}".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Value:
    """A measured number and the ends of its interval, None where it was told without one."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, *, signed: bool = False) -> str:
        return number(self.value, signed=signed)

    def interval(self, *, signed: bool = False) -> str:
        if self.low is None or self.high is None:
            return ""
        return f"{number(self.low, signed=signed)} to {number(self.high, signed=signed)}"

    @property
    def ends(self) -> tuple[float, float]:
        return (self.value if self.low is None else self.low, self.value if self.high is None else self.high)

    @property
    def clear_of_zero(self) -> bool:
        low, high = self.ends
        return self.low is not None and (low > 0 or high < 0)


@dataclass(frozen=True)
class Comparison:
    """One metric of base and adapter; `change` is adapter minus base."""

    metric: str
    base: Value | None
    adapter: Value | None
    change: Value | None

    @property
    def values(self) -> list[Value]:
        return [value for value in (self.base, self.adapter) if value is not None]

    @property
    def outcome(self) -> str:
        """better, worse, changed (where it is not known which is better), open, or nothing without an interval."""
        if self.change is None or self.change.low is None:
            return ""
        if not self.change.clear_of_zero:
            return "open"
        rises = self.change.value > 0
        if self.metric in LOWER:
            return "worse" if rises else "better"
        if self.metric in HIGHER or self.metric.startswith("pass@"):
            return "better" if rises else "worse"
        return "changed"


@dataclass(frozen=True)
class Grid:
    """A plain table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Block:
    """What one entry of scores.json holds: facts, metrics, tables."""

    title: str
    facts: tuple[tuple[str, str], ...]
    comparisons: tuple[Comparison, ...]
    grids: tuple[Grid, ...]


def as_value(content: Any) -> Value | None:
    """A number, or an object with `value`, `low` and `high`, as a `Value`; None for anything else."""
    if isinstance(content, bool):
        return None
    if isinstance(content, int | float):
        return Value(float(content))
    if isinstance(content, Mapping) and isinstance(content.get("value"), int | float):
        ends = (content.get("low"), content.get("high"))
        if all(isinstance(end, int | float) for end in ends):
            return Value(float(content["value"]), float(ends[0]), float(ends[1]))  # type: ignore[arg-type]
        return Value(float(content["value"]))
    return None


def comparisons(content: Mapping[str, Any]) -> tuple[Comparison, ...]:
    """The metrics of an object with `base`, `adapter` and `change`, in the adapter's order."""
    sides = (content.get(who) for who in WHO)
    base, adapter, change = (side if isinstance(side, Mapping) else {} for side in sides)
    names = dict.fromkeys((*adapter, *base, *change))
    found = (Comparison(name, *(as_value(part.get(name)) for part in (base, adapter, change))) for name in names)
    return tuple(one for one in found if one.base or one.adapter or one.change)


def blocks(content: Mapping[str, Any], title: str = "") -> list[Block]:
    """An entry of scores.json by its shape alone, so that what is measured later is shown as well.

    Objects with `base` and `adapter` become metrics, lists of objects tables, other objects blocks of their own.
    """
    facts: list[tuple[str, str]] = []
    found = list(comparisons(content)) if "adapter" in content else []
    grids: list[Grid] = []
    below: list[Block] = []
    for key, value in content.items():
        if key in WHO and isinstance(value, Mapping):
            continue
        name = str(key).replace("_", " ")
        if isinstance(value, Mapping):
            sides = [as_value(value.get(who)) for who in WHO]
            if any(sides):
                found.append(Comparison(str(key), *sides))
            else:
                below += blocks(value, f"{title}: {name}" if title else name)
        elif isinstance(value, Sequence) and not isinstance(value, str) and value:
            grids.append(_grid(name, value))
        elif not isinstance(value, Sequence) or isinstance(value, str):
            facts.append((name, _text(value)))
    own = Block(title, tuple(facts), tuple(found), tuple(grids))
    return ([own] if facts or found or grids else []) + below


def _grid(name: str, values: Sequence[Any]) -> Grid:
    if all(isinstance(value, Mapping) for value in values):
        columns = list(dict.fromkeys(key for value in values for key in value))
        rows = tuple(tuple(_text(value.get(key)) for key in columns) for value in values)
        return Grid(name, tuple(str(column).replace("_", " ") for column in columns), rows)
    return Grid(name, (), tuple((_text(value),) for value in values))


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    told = as_value(value)
    if told is not None:
        return f"{told.text()} ({told.interval()})" if told.interval() else told.text()
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Verdict:
    """The run in one sentence, and the metric that it speaks of."""

    sentence: str
    comparison: Comparison
    rows: int
    confidence: str


def verdict(recipe: Recipe, scores: Mapping[str, Any]) -> Verdict | None:
    """The first metric that the recipe sets a target for; else accuracy, that of generated answers, or the loss."""
    by_name = {one.metric: one for one in comparisons(scores) if one.base and one.adapter and one.change}
    generated = [name for name in by_name if name not in LOWER_IS_BETTER]
    chosen = next((by_name[name] for name in (*recipe.evaluation.target, *generated, "loss") if name in by_name), None)
    if chosen is None or chosen.base is None or chosen.adapter is None or chosen.change is None:
        return None
    rows, confidence = int(scores["rows"]), f"{100 * recipe.evaluation.confidence:g}\N{NO-BREAK SPACE}%"
    change = chosen.change
    moved = "stayed at" if change.value == 0 else "rose" if change.value > 0 else "fell"
    path = (
        f"{moved} {chosen.base.text()}"
        if change.value == 0
        else f"{moved} from {chosen.base.text()} to {chosen.adapter.text()}"
    )
    said = {
        "better": "clear of zero: the adapter is better than its base",
        "worse": "clear of zero: the adapter is worse than its base",
        "changed": "clear of zero",
        "open": "which holds zero: no difference from the base is shown",
    }[chosen.outcome]
    name = chosen.metric.replace("_", " ")
    sentence = (
        f"On {rows:,} held-out rows, {name} {path}. The change is {change.text(signed=True)}, "
        f"{confidence} interval {change.interval(signed=True)}, {said}."
    )
    return Verdict(sentence, chosen, rows, confidence)
