"""Tables of several runs side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from ift_peft.console import out

if TYPE_CHECKING:
    from ift_peft.evaluate.contrast import Contrast, Probe
    from ift_peft.evaluate.intervals import Estimate


def print_contrast(contrast: Contrast) -> None:
    """Each probe's scores by arm, and the differences of every two arms."""
    for probe in contrast.probes:
        out.print(_scores(probe))
        if probe.differences:
            out.print(_differences(probe))
        out.print()
    out.print(contrast.describe(), markup=False)
    for note in contrast.notes:
        out.print(f"note: {note}", markup=False)


def _scores(probe: Probe) -> Table:
    title = f"{probe.name}: {probe.metric} on {probe.rows:,} rows"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("adapter", justify="right")
    table.add_column("runs", justify="right")
    table.add_column("lowest - highest", justify="right")
    for score in probe.scores:
        several = len(score.by_run) > 1
        spread = f"{min(score.by_run):.3f} - {max(score.by_run):.3f}" if several else ""
        table.add_row(escape(score.arm), cell(score.estimate), str(len(score.by_run)), spread)
    return table


def _differences(probe: Probe) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("difference", justify="right")
    table.add_column("p", justify="right")
    several = len(probe.differences) > 1
    if several:
        table.add_column("adjusted", justify="right")
    for one in probe.differences:
        cells = [f"{escape(one.second)} - {escape(one.first)}", cell(one.estimate, signed=True), f"{one.p:.3f}"]
        table.add_row(*cells, *([f"{one.adjusted_p:.3f}"] if several else []))
    return table


def print_ensemble(scores: dict[str, Any]) -> None:
    """Each member, the ensemble, and what it changes from each, by accuracy, F1, calibration error and log loss."""
    names = ("accuracy", "f1", "ece", "nll")
    title = f"ensemble by {scores['kind']} on {scores['rows']:,} rows"
    whole = {**scores["members"], "ensemble": scores["ensemble"]}
    changes = {f"ensemble - {name}": change for name, change in scores["change"].items()}
    for heading, lines, signed in ((title, whole, False), ("differences, paired", changes, True)):
        table = Table(title=heading, title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("")
        for name in names:
            table.add_column(name, justify="right")
        for who, one in lines.items():
            table.add_row(escape(who), *(_told(one[name], signed=signed) for name in names))
        out.print(table)
        out.print()
    out.print(f"{scores['intervals']}\n{scores['verdict']}", markup=False)


def _told(part: dict[str, float], *, signed: bool) -> str:
    sign = "+" if signed else ""
    return f"{part['value']:{sign}.3f} [{part['low']:{sign}.3f}, {part['high']:{sign}.3f}]"


def cell(estimate: Estimate, *, signed: bool = False) -> str:
    """A value with its interval."""
    sign = "+" if signed else ""
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
