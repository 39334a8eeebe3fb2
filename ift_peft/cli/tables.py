"""Tables of several runs, and of what became of one merged, side by side."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from ift_peft.console import cell, out

if TYPE_CHECKING:
    from ift_peft.adapters.merge import MergeResult
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
        table.add_row(escape(score.arm), spelled(score.estimate), str(len(score.by_run)), spread)
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
        cells = [
            f"{escape(one.second)} - {escape(one.first)}",
            spelled(one.estimate, signed=True),
            f"{one.p:.3f}",
        ]
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
            table.add_row(escape(who), *(cell(one[name], signed=signed) for name in names))
        out.print(table)
        out.print()
    out.print(f"{scores['intervals']}\n{scores['verdict']}", markup=False)


def spelled(estimate: Estimate, *, signed: bool = False) -> str:
    """A value with its interval."""
    sign = "+" if signed else ""
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def print_merge(result: MergeResult, *, quantization: str) -> None:
    """What was written, and how it and the other candidates compare with the run on its held-out rows."""
    written = result.written
    onto = f"{quantization} weights, dequantised" if written.onto == "dequantized" else "the unquantised base"
    packed = ", quantised to nf4" if written.quantization == "nf4" else ""
    out.print(f"merged   {os.path.relpath(result.folder)} (into {onto}; {result.dtype}{packed})", markup=False)
    origin = "those before writing" if packed else "the adapter's over these weights"
    logits = f"at most {written.max_logit_difference:.2e} from {origin}, on {result.rows} held-out rows"
    out.print(f"logits   {logits}", markup=False)
    if written.same_labels is not None:
        out.print(f"labels   {written.same_labels} of {result.rows} as in the run", markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "KL to run", "max", result.metric, "labels"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    table.add_row(
        "run" if quantization == "none" else f"run over {quantization}", "", "", spelled(result.run_metric), ""
    )
    for one in result.candidates:
        kl = (f"{one.from_run.kl_mean:.1e}", f"{one.from_run.kl_max:.1e}")
        again = " to nf4" if one.quantization == "nf4" else ""
        name = f"{'*' if one is written else ' '}{NAMES[one.onto]}{again}"
        table.add_row(name, *kl, spelled(one.metric), "" if one.same_labels is None else str(one.same_labels))
    out.print(table)


# What was merged into, as tables have it.
NAMES = {"unquantized": "unquantised", "dequantized": "dequantised"}
