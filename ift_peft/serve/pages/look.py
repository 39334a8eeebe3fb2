"""What a file of training rows holds, and what is wrong with it, found without a base."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median

from ift_peft.data.formats import to_rows
from ift_peft.data.quality.finding import Finding
from ift_peft.data.row import Row
from ift_peft.data.sources import Record
from ift_peft.errors import DataError, IftPeftError
from ift_peft.report.examples import Text, cut
from ift_peft.sections import Data, Quality

MOST_ROWS = 5000  # near duplicates of these take seconds
MOST_CLASSES = 30
LONGEST_CLASS = 64  # characters of an answer that may be the name of a class
SHOWN_ROWS = 3
SHOWN_FAULTS = 20
KEPT = 128
CHECKS = Quality(mislabelled="off", overlong="off", leakage="off")


@dataclass(frozen=True)
class Lengths:
    """Of texts, in characters."""

    shortest: int
    median: int
    longest: int


@dataclass(frozen=True)
class Look:
    """A file's first `rows` rows; `more` where it has others behind them."""

    rows: int
    more: bool
    asked: Lengths | None
    answers: Lengths | None
    several_turns: int
    classes: tuple[tuple[Text, int, float], ...]
    """Answer, rows and share of it, where answers repeat as the names of classes do."""
    findings: tuple[Finding, ...]
    faults: tuple[str, ...]
    first: tuple[tuple[Text, Text], ...]

    @property
    def found(self) -> int:
        """How many kinds of things are wrong."""
        return len(self.findings) + bool(self.faults)


class Looks:
    """Files that were looked at, the last ones remembered. One at a time: others have the processors too."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, tuple[Look, float]] = OrderedDict()
        self._lock = threading.Lock()
        self._turn = threading.Lock()

    def known(self, file_id: str) -> Look | None:
        """What was seen of a file that has neither been forgotten nor expired."""
        with self._lock:
            for ended in [one for one, (_, until) in self._seen.items() if until <= time.time()]:
                del self._seen[ended]
            found = self._seen.get(file_id)
        return None if found is None else found[0]

    def look(self, file_id: str, path: Path, *, until: float | None = None) -> Look:
        """What the file of that id at `path` holds, remembered `until` then. Raises OSError where it cannot be read."""
        with self._turn:
            found = self.known(file_id) or look(path)
        with self._lock:
            self._seen[file_id] = (found, math.inf if until is None else until)
            while len(self._seen) > KEPT:
                self._seen.popitem(last=False)
        return found

    def forget(self, file_id: str) -> None:
        """What is deleted is not to be seen any more."""
        with self._lock:
            self._seen.pop(file_id, None)


def look(path: Path) -> Look:
    """Read and check the first rows of a JSONL file. Raises OSError where it cannot be read."""
    from ift_peft.data.quality.checks import find  # takes a second, which a service's start need not

    faults: list[IftPeftError] = []
    with path.open("rb") as lines:
        piece = list(islice(lines, MOST_ROWS + 1))
    records = _records(piece[:MOST_ROWS], faults)
    rows = to_rows(records, Data(train=path.name), faults)
    classes = _classes(rows)
    if classes:
        rows = [replace(row, label=row.answer) for row in rows]
    findings = find(rows, (), CHECKS, labels=(), lengths=None, max_length=None) if rows else []
    return Look(
        rows=len(rows),
        more=len(piece) > MOST_ROWS,
        asked=_lengths([_question(row) for row in rows]),
        answers=_lengths([row.answer for row in rows]),
        several_turns=sum(len(row.earlier) > 0 for row in rows),
        classes=tuple((cut(name), count, count / len(rows)) for name, count in classes),
        findings=tuple(one for one in findings if one.count),
        faults=tuple(f"expected {one.expected}; found {one.found}; {one.fix}" for one in faults[:SHOWN_FAULTS]),
        first=tuple((cut(_question(row)), cut(row.answer)) for row in rows[:SHOWN_ROWS]),
    )


def _records(lines: Sequence[bytes], faults: list[IftPeftError]) -> list[Record]:
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if isinstance(values, dict):
            records.append(Record(values, f"line {number}"))
        else:
            faults.append(
                DataError(
                    expected="one JSON object a line",
                    found=f"something else at line {number}",
                    fix="repair the line and upload the file again",
                )
            )
    return records


def _question(row: Row) -> str:
    return next((one["content"] for one in reversed(row.prompt) if one["role"] == "user"), "")


def _lengths(texts: Sequence[str]) -> Lengths | None:
    sizes = [len(text) for text in texts]
    return Lengths(min(sizes), round(median(sizes)), max(sizes)) if sizes else None


def _classes(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Answers and how often they are given, the commonest first; none where they are answers of their own."""
    counts = Counter(row.answer for row in rows)
    alike = 1 < len(counts) <= MOST_CLASSES and len(rows) >= 3 * len(counts)
    return counts.most_common() if alike and max(map(len, counts)) <= LONGEST_CLASS else []
