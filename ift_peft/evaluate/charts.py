"""Charts as SVG: arms with their intervals, and scores against the number of training rows.

Drawn through matplotlib's objects, so that no window system is asked for and no state is shared. Text stays text, which
keeps Chinese names readable wherever the file is shown; equal input gives equal bytes.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from ift_peft.durable import write_atomically
from ift_peft.evaluate.contrast import Contrast
from ift_peft.evaluate.intervals import Estimate

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/) without the yellow, which is faint on white: told apart
# without red-green vision, and each visible on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ift_peft",
    "text.parse_math": False,
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}
NAME_WIDTH = 36
FAINT = 0.35


@dataclass(frozen=True)
class Curve:
    """One line of a curve chart: at each number of rows the score, its interval, and the value of each run."""

    name: str
    rows: tuple[int, ...]
    estimates: tuple[Estimate, ...]
    by_run: tuple[tuple[float, ...], ...]


def interval_chart(contrast: Contrast, path: Path, *, title: str) -> None:
    """Write a panel for each probe, with dot and interval of each arm, and a faint dot for each run."""
    arms = [textwrap.fill(arm.name, NAME_WIDTH) for arm in contrast.arms]
    lines = sum(name.count("\n") + 1 for name in arms)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.0 + 3.0 * len(contrast.probes), 1.4 + 0.3 * max(lines, 2)), layout="constrained")
        panels = figure.subplots(1, len(contrast.probes), sharex=True, sharey=True, squeeze=False)[0]
        for axes, probe in zip(panels, contrast.probes, strict=True):
            for at, score in enumerate(probe.scores):
                colour = COLOURS[at % len(COLOURS)]
                _bar(axes, score.estimate, at, colour=colour)
                if len(score.by_run) > 1:
                    axes.plot(
                        score.by_run, [at + 0.22] * len(score.by_run), "o", color=colour, alpha=FAINT, markersize=4
                    )
            axes.set_title(probe.name, fontsize=10)
            axes.set_xlabel(probe.metric)
            axes.grid(axis="x", color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
        panels[0].set_yticks(range(len(arms)), labels=arms)
        panels[0].set_ylim(len(arms) - 0.5, -0.5)
        figure.suptitle(title, fontsize=11)
        _write(figure, path)


def _bar(axes: Any, estimate: Estimate, at: float, *, colour: str) -> None:
    axes.plot([estimate.low, estimate.high], [at, at], "-", color=colour, linewidth=2)
    axes.plot([estimate.value], [at], "o", color=colour, markersize=7)


def curve_chart(
    curves: Sequence[Curve], path: Path, *, title: str, metric: str, reference: tuple[str, float] | None = None
) -> None:
    """Write scores against training rows on a logarithmic scale, each with its interval and a faint dot for each run.

    `reference` is the name and height of a horizontal line, such as the base's score.
    """
    rows = sorted({number for curve in curves for number in curve.rows})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = figure.subplots()
        for at, curve in enumerate(curves):
            colour = COLOURS[at % len(COLOURS)]
            values = [estimate.value for estimate in curve.estimates]
            low, high = ([getattr(one, end) for one in curve.estimates] for end in ("low", "high"))
            axes.fill_between(curve.rows, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.vlines(curve.rows, low, high, color=colour, linewidth=1)
            axes.plot(curve.rows, values, "o-", color=colour, label=curve.name)
            for number, seeds in zip(curve.rows, curve.by_run, strict=True):
                if len(seeds) > 1:
                    axes.plot([number] * len(seeds), seeds, "o", color=colour, alpha=FAINT, markersize=4)
        if reference is not None:
            axes.axhline(reference[1], color="#555555", linestyle="--", linewidth=1, label=reference[0])
        axes.set_xscale("log")
        axes.set_xlim(rows[0] / 1.3, rows[-1] * 1.3)
        axes.xaxis.set_major_locator(FixedLocator(rows))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("training rows")
        axes.set_ylabel(metric)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
        axes.set_title(title, fontsize=11)
        _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    """Write `figure` without date or metadata, and without the DTD that some readers would fetch."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        # only measuring is done with matplotlib's font; the reader's own has the character
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font", category=UserWarning)
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    head, _, rest = buffer.getvalue().partition("<!DOCTYPE")
    write_atomically(path, head + rest.partition(">")[2].lstrip("\n") if rest else head)
