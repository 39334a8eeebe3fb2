"""The tables of several adapters compared on several domains."""

from __future__ import annotations

from typing import Any


def print_merging(scores: dict[str, Any], *, title: str) -> None:
    """The tables of scores.json: on each domain every arm, and its change from the domain's own adapter."""
    from rich.markup import escape
    from rich.table import Table

    from ift_peft.console import cell, out

    out.print(f"{title}\n", markup=False)
    for name, own in scores["domains"].items():
        told = f"{escape(name)}: {own['metric']} on {own['rows']} rows"
        table = Table(title=told, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for heading in ("", own["metric"], f"change from {escape(name)}"):
            table.add_column(heading, justify="right" if heading else "left")
        for arm, one in own["arms"].items():
            table.add_row(escape(arm), cell(one["score"], signed=False), cell(one["change"], signed=True))
        out.print(table)
        out.print()
    if scores["mean"]:
        table = Table(
            title="mean over domains", title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False
        )
        for arm, mean in sorted(scores["mean"].items(), key=lambda one: -one[1]):
            table.add_row(escape(arm), f"{mean:.3f}")
        out.print(table)
    out.print(f"\n{scores['intervals']};\nchanges are paired: both on the same resampled rows\n", markup=False)
