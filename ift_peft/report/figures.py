"""Where the marks of a figure stand: percentages of a plot's width and height, which the template draws as SVG.

Percentages keep text at its size and circles round at every width, from a phone to paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ift_peft.report.scores import Comparison, Value, number

MOST_POINTS = 500
WIDE_RANGE = 50.0  # highest by lowest, from which on an axis is logarithmic
RATES = ("accuracy", "precision", "recall", "f1", "exact_match", "rouge1", "rouge2", "rougeL", "ece")


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class LineChart:
    """One series over training steps; `path` is the points of a polyline in a square of side 1000."""

    name: str
    path: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    alternative: str
    logarithmic: bool


@dataclass(frozen=True)
class Whisker:
    """A dot and the ends of its interval, in percent from the left."""

    who: str
    low: float
    at: float
    high: float


@dataclass(frozen=True)
class Strip:
    """Base and adapter of one metric on one scale; `ticks` is empty where the strip below has the same."""

    metric: str
    outcome: str
    whiskers: tuple[Whisker, ...]
    ticks: tuple[Tick, ...]
    alternative: str


@dataclass(frozen=True)
class Dot:
    """A bin of a reliability diagram: percent from the left and from the top, and a radius in pixels."""

    who: str
    x: float
    y: float
    radius: float
    text: str


def nice_ticks(low: float, high: float, *, most: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover `low` to `high`, about `most` of them."""
    span = (high - low) or abs(high) or 1.0
    raw = span / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9)), 10 * power)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    return [index * step for index in range(first, last + 1)]


def short(value: float) -> str:
    """A number as a tick shows it."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "\N{MINUS SIGN}")
    return f"{value:,.6g}".replace("-", "\N{MINUS SIGN}")


def line_charts(lines: Sequence[Mapping[str, Any]]) -> list[LineChart]:
    """Loss, learning rate and every `eval_` score of metrics.jsonl, each over its steps."""
    names = dict.fromkeys(key for line in lines for key in line if key.startswith("eval_"))
    charts = []
    for key in ("loss", "learning_rate", *names):
        points = [
            (float(line["step"]), float(line[key]))
            for line in lines
            if isinstance(line.get(key), int | float) and "step" in line and math.isfinite(line[key])
        ]
        if points:
            charts.append(line_chart(_name(key), points))
    return charts


def _name(key: str) -> str:
    if key.startswith("eval_"):
        return f"validation {key.removeprefix('eval_').replace('_', ' ')}"
    return {"loss": "training loss", "learning_rate": "learning rate"}[key]


def line_chart(name: str, points: Sequence[tuple[float, float]]) -> LineChart:
    """A chart of (step, value) points; long ones are averaged down to 500 points, which their text does not use."""
    values = [value for _, value in points]
    lowest, highest = min(values), max(values)
    logarithmic = name != "learning rate" and lowest > 0 and highest / lowest > WIDE_RANGE
    if logarithmic:
        powers = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
        ticks = [10.0**power for power in powers]
        ticks = ticks[:: max(1, math.ceil(len(ticks) / 6))] if len(ticks) > 6 else ticks
    else:
        ticks = nice_ticks(min(0.0, lowest), highest)
    bottom, top = min(ticks[0], lowest), max(ticks[-1], highest)

    def height(value: float) -> float:
        if logarithmic:
            return (math.log10(value) - math.log10(bottom)) / (math.log10(top) - math.log10(bottom))
        return (value - bottom) / (top - bottom)

    last = points[-1][0]
    steps = [tick for tick in nice_ticks(0.0, last, most=5) if tick <= last]
    path = " ".join(f"{1000 * x / (last or 1):.1f},{1000 * (1 - height(y)):.1f}" for x, y in _thinned(points))
    best = min(points, key=lambda point: point[1])
    told = f"{name} from {number(values[0])} at step {points[0][0]:,.0f} to {number(values[-1])} at step {last:,.0f}"
    if name == "learning rate":
        told = f"learning rate: at most {highest:.3g}, {values[-1]:.3g} at step {last:,.0f}"
    elif best[1] < values[-1]:
        told += f", lowest {number(best[1])} at step {best[0]:,.0f}"
    return LineChart(
        name,
        path,
        tuple(Tick(100 * step / (last or 1), f"{step:,.0f}") for step in steps),
        tuple(Tick(100 * (1 - height(tick)), short(tick)) for tick in ticks),
        told,
        logarithmic,
    )


def _thinned(points: Sequence[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    size = math.ceil(len(points) / MOST_POINTS)
    for start in range(0, len(points), size):
        part = points[start : start + size]
        yield sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)


def strips(found: Sequence[Comparison]) -> list[Strip]:
    """A strip for each metric that base or adapter has; rates share the scale from 0 to 1."""
    shown = [one for one in found if one.values]
    scales = [_scale(one) for one in shown]
    made = []
    for at, (one, ticks) in enumerate(zip(shown, scales, strict=True)):
        low, high = ticks[0], ticks[-1]
        sides = [(who, value) for who, value in (("base", one.base), ("adapter", one.adapter)) if value is not None]
        whiskers = tuple(
            Whisker(who, *(100 * (end - low) / (high - low) for end in (value.ends[0], value.value, value.ends[1])))
            for who, value in sides
        )
        followed = at + 1 < len(shown) and scales[at + 1] == ticks
        axis = () if followed else tuple(Tick(100 * (tick - low) / (high - low), short(tick)) for tick in ticks)
        told = "; ".join(_told(who, value) for who, value in sides)
        made.append(Strip(one.metric.replace("_", " "), one.outcome, whiskers, axis, f"{one.metric}: {told}"))
    return made


def _told(who: str, value: Value) -> str:
    return f"{who} {value.text()}" + (f", interval {value.interval()}" if value.interval() else "")


def _scale(one: Comparison) -> list[float]:
    ends = [end for value in one.values for end in value.ends]
    if (one.metric in RATES or one.metric.startswith("pass@")) and min(ends) >= 0 and max(ends) <= 1:
        return [0.0, 0.25, 0.5, 0.75, 1.0]
    return nice_ticks(min(ends), max(ends), most=5)


def reliability(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Dot]:
    """The bins of scores.json's calibration as dots whose areas are their shares of the rows."""
    dots = []
    for who in ("base", "adapter"):
        total = sum(one["rows"] for one in bins.get(who, ())) or 1
        dots += [
            Dot(
                who,
                100 * one["confidence"],
                100 * (1 - one["accuracy"]),
                3 + 13 * math.sqrt(one["rows"] / total),
                f"{who}: {one['rows']:,} rows with confidence {one['confidence']:.2f}, {one['accuracy']:.2f} right",
            )
            for one in bins.get(who, ())
        ]
    return dots
