"""What a file of training rows holds, and what is wrong with it, found without a base."""

from __future__ import annotations

import json
import math
import threading
import time
from codecs import BOM_UTF8
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import anyio.to_thread

from ift_peft.data.fields import Record
from ift_peft.data.formats import to_rows
from ift_peft.data.quality.finding import Finding
from ift_peft.data.row import Row
from ift_peft.errors import DataError, IftPeftError
from ift_peft.report.examples import Text, cut
from ift_peft.sections import Data, Quality

MOST_ROWS = 5000
MOST_BYTES = 2 << 20  # near duplicates of these take seconds
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
    """The first of them; `faulty` counts them all."""
    faulty: int
    first: tuple[tuple[Text, Text], ...]

    @property
    def found(self) -> int:
        """How many kinds of things are wrong."""
        return len(self.findings) + bool(self.faults)


class Looks:
    """Files that were looked at, the last ones remembered.

    One at a time, as others have the processors too; those that wait for their turn keep no thread of the routes.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[str, tuple[Look, float]] = OrderedDict()
        self._lock = threading.Lock()
        self._turn = anyio.CapacityLimiter(1)
        self._looking: str | None = None  # at which file, unless it has been forgotten meanwhile

    def known(self, file_id: str) -> Look | None:
        """What was seen of a file that has neither been forgotten nor expired."""
        with self._lock:
            for ended in [one for one, (_, until) in self._seen.items() if until <= time.time()]:
                del self._seen[ended]
            found = self._seen.get(file_id)
        return None if found is None else found[0]

    async def look(self, file_id: str, path: Path, *, until: float | None = None) -> Look:
        """What the file of that id at `path` holds, remembered `until` then. Raises OSError where it cannot be read."""
        found = self.known(file_id)
        if found is None:
            found = await anyio.to_thread.run_sync(self._look, file_id, path, until, limiter=self._turn)
        return found

    def _look(self, file_id: str, path: Path, until: float | None) -> Look:
        found = self.known(file_id)
        if found is not None:
            return found
        with self._lock:
            self._looking = file_id
        found = look(path)
        with self._lock:
            if self._looking == file_id:
                self._seen[file_id] = (found, math.inf if until is None else until)
            self._looking = None
            while len(self._seen) > KEPT:
                self._seen.popitem(last=False)
        return found

    def forget(self, file_id: str) -> None:
        """What is deleted is not to be seen any more, also by a look that is going on."""
        with self._lock:
            self._seen.pop(file_id, None)
            if self._looking == file_id:
                self._looking = None


def look(path: Path) -> Look:
    """Read and check the first rows of a JSONL file. Raises OSError where it cannot be read."""
    from ift_peft.data.quality.checks import find  # takes a second, which a service's start need not

    faults: list[IftPeftError] = []
    piece, more = _first_lines(path)
    records = _records(piece, faults)
    rows = to_rows(records, Data(train=path.name), faults)
    classes = _classes(rows)
    if classes:
        rows = [replace(row, label=row.answer) for row in rows]
    findings = find(rows, (), CHECKS, labels=(), lengths=None, max_length=None) if rows else []
    return Look(
        rows=len(rows),
        more=more,
        asked=_lengths([_question(row) for row in rows]),
        answers=_lengths([row.answer for row in rows]),
        several_turns=sum(len(row.earlier) > 0 for row in rows),
        classes=tuple((cut(name), count, count / len(rows)) for name, count in classes),
        findings=tuple(one for one in findings if one.count),
        faults=tuple(f"expected {one.expected}; found {one.found}; {one.fix}" for one in faults[:SHOWN_FAULTS]),
        faulty=len(faults),
        first=tuple((cut(_question(row)), cut(row.answer)) for row in rows[:SHOWN_ROWS]),
    )


def _first_lines(path: Path) -> tuple[list[bytes], bool]:
    """The first whole lines, of `MOST_BYTES` together, and whether there are more."""
    found: list[bytes] = []
    left = MOST_BYTES
    with path.open("rb") as lines:
        while line := lines.readline(left + 1):
            if len(found) == MOST_ROWS or len(line) > left:
                return found, True
            found.append(line)
            left -= len(line)
    return found, False


def _records(lines: Sequence[bytes], faults: list[IftPeftError]) -> list[Record]:
    records = []
    for number, whole in enumerate(lines, start=1):
        line = whole.removeprefix(BOM_UTF8) if number == 1 else whole  # as the check of uploads and training read it
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
