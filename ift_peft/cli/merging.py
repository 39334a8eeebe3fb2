"""The table of several adapters compared on several domains."""

from __future__ import annotations

from typing import Any


def print_merging(scores: dict[str, Any], *, title: str) -> None:
    """The table of scores.json: every arm on each domain, and its change from the domain's own adapter."""
    from rich.markup import escape
    from rich.table import Table

    from ift_peft.console import cell, out

    domains = scores["domains"]
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name, own in domains.items():
        table.add_column(f"{escape(name)}\n{own['metric']}", justify="right")
        table.add_column("change from\nits own", justify="right")
    if scores["mean"]:
        table.add_column("mean", justify="right")
    for arm in dict.fromkeys(arm for own in domains.values() for arm in own["arms"]):
        found = [own["arms"].get(arm) for own in domains.values()]
        cells = [cell(one and one[what], signed=what == "change") for one in found for what in ("score", "change")]
        mean = [f"{scores['mean'][arm]:.3f}" if arm in scores["mean"] else ""] if scores["mean"] else []
        table.add_row(escape(arm), *cells, *mean)
    out.print(table)
    out.print(f"\n{scores['intervals']};\nchanges are paired: both on the same resampled rows\n", markup=False)
