"""The table of faults: what was done, what was expected, what was seen. Each row is a test."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

GROUPS = ("checkpoints", "endings", "inputs", "artefacts", "runs", "service")
_FOLDERS = re.compile(  # of a test; at its end, one that was cut
    r"(?:/[^\s/]+)*/pytest-(?:of-[^\s/]+|\d+)(?:/(?:pytest-\d+|popen-gw\d+))*/?(?:[^\s/]+/?)?|/tmp/\S*$"
)
HEADER = """# Faults

What goes wrong, what is expected to come of it, and what was seen. Each row is a test in `tests/faults`; `make faults`
runs them all and writes this page.
"""


@dataclass(frozen=True)
class Row:
    """One row; `observed` is empty where the test failed before it saw anything."""

    group: str
    fault: str
    expected: str
    observed: str
    passed: bool

    def write(self, folder: Path, name: str) -> None:
        (folder / f"{name}.json").write_text(json.dumps(asdict(self), ensure_ascii=False), "utf-8")


def read_rows(folder: Path) -> list[Row]:
    """The rows in `folder`, by group and in the order of their names."""
    rows = [Row(**json.loads(path.read_text("utf-8"))) for path in sorted(folder.glob("*.json"))]
    return sorted(rows, key=lambda row: GROUPS.index(row.group))


def why_not_kept(rows: Sequence[Row], *, asked: int | None, outcomes: Sequence[str]) -> str | None:
    """Why a page of these rows would say too much; None where it may be kept.

    `asked` is how many rows there are; None where tests were left out. `outcomes` are those of tests, with or without
    a row, that did not pass.
    """
    if outcomes:
        return f"tests {' and '.join(outcomes)}"
    if asked is None:
        return "only a part of the rows was asked for; all are by --all-faults, over the whole folder"
    bad = sum(not row.passed for row in rows)
    if bad or not asked or len(rows) != asked:
        return f"{len(rows) - bad} of {asked} rows are as expected"
    return None


def as_markdown(rows: list[Row]) -> str:
    """The page that docs/ keeps."""
    lines = [HEADER]
    for group in GROUPS:
        own = [row for row in rows if row.group == group]
        if own:
            lines += ["", f"## {group.capitalize()}", "", "| fault | expected | observed |", "|---|---|---|"]
            lines += [f"| {_cell(row.fault)} | {_cell(row.expected)} | {_cell(_seen(row))} |" for row in own]
    return "\n".join(lines) + "\n"


def _seen(row: Row) -> str:
    return row.observed if row.passed else f"**not as expected** {row.observed}"


def _cell(text: str) -> str:
    return _FOLDERS.sub("…/", text).replace("|", "\\|").replace("\n", " ")
