"""Tables of several runs, and of what became of one merged, side by side."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from ift_peft.console import out

if TYPE_CHECKING:
    from ift_peft.adapters.certificate import Candidate
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


def cell(estimate: Estimate, *, signed: bool = False) -> str:
    """A value with its interval."""
    sign = "+" if signed else ""
    return f"{estimate.value:{sign}.3f} [{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"


def print_merge(result: MergeResult, *, quantization: str) -> None:
    """What was written, and how it and the other candidates compare with the run on its held-out rows."""
    written = result.written
    out.print(f"merged   {os.path.relpath(result.folder)} ({_candidate(written, quantization)})", markup=False)
    from_what = "as quantised, before writing" if written.quantization == "nf4" else "over these weights"
    of_what = "" if written.quantization == "nf4" else "the adapter's "
    out.print(
        f"logits   at most {written.max_logit_difference:.2e} from {of_what}{from_what}, on {result.rows} held-out rows",
        markup=False,
    )
    if written.same_labels is not None:
        out.print(f"labels   {written.same_labels} of {result.rows} as in the run", markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for heading in ("KL to the run", "max", result.metric, "labels as in the run"):
        table.add_column(heading, justify="right")
    table.add_row("run" if quantization == "none" else f"run, over {quantization}", "", "", cell(result.run_metric), "")
    for one in result.candidates:
        kl = (f"{one.from_run.kl_mean:.1e}", f"{one.from_run.kl_max:.1e}")
        same = "" if one.same_labels is None else f"{one.same_labels} of {result.rows}"
        mark = "*" if one is written and len(result.candidates) > 1 else ""
        table.add_row(f"{mark}{_candidate(one, quantization)}", *kl, cell(one.metric), same)
    out.print(table)


def _candidate(one: Candidate, quantization: str) -> str:
    onto = f"{quantization} weights dequantised" if one.onto == "dequantized" else "unquantised weights"
    packed = ", quantised to nf4" if one.quantization == "nf4" else ""
    return f"into {onto}, {one.dtype}{packed}"
