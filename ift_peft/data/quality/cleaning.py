"""What is done about findings: refuse the rows, leave some out, take personal data out. Held-out rows never change."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ift_peft.data.quality.finding import Finding, action_of, text_of
from ift_peft.data.quality.personal_data import redact
from ift_peft.data.row import Message, Row
from ift_peft.errors import DataError, raise_all
from ift_peft.sections import Quality


@dataclass(frozen=True)
class Dropped:
    """A training row that was left out, and the kinds of findings it was left out for."""

    where: str
    kinds: tuple[str, ...]
    text: str

    def to_json(self) -> dict[str, Any]:
        return {"where": self.where, "kinds": list(self.kinds), "text": self.text}


@dataclass(frozen=True)
class Cleaned:
    """The training rows that are kept, those left out, and how many pieces of personal data were taken out of which."""

    rows: list[Row]
    dropped: list[Dropped]
    redacted: dict[str, int]
    redacted_rows: int

    def notes(self) -> list[str]:
        """What was done, in words."""
        notes = []
        if self.dropped:
            kinds = Counter(kind for row in self.dropped for kind in row.kinds)
            counts = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
            notes.append(f"{len(self.dropped)} training rows were left out (data.quality: {counts})")
        if self.redacted:
            counts = ", ".join(f"[{word}] {count}" for word, count in sorted(self.redacted.items()))
            notes.append(f"personal data in {self.redacted_rows} training rows was replaced ({counts})")
        return notes


def apply(train: Sequence[Row], findings: Sequence[Finding], section: Quality) -> Cleaned:
    """The training rows as `section` wants them, given what `find` found in them.

    Raises a `DataError` for every finding of a kind whose action is `stop`, and where no row would be left.
    """
    raise_all([_refusal(found) for found in findings if found.count and action_of(found.kind, section) == "stop"])
    reasons: dict[int, list[str]] = defaultdict(list)
    for found in findings:
        if action_of(found.kind, section) == "drop":
            for number in found.rows:
                reasons[number].append(found.kind)
    if train and len(reasons) == len(train):
        raise DataError(
            expected="training rows that are left",
            found=f"none of {len(train)}; all were dropped by data.quality",
            fix="repair the rows, or set some of data.quality to warn; ift check shows what is found",
        )
    rows, counts, redacted_rows = [], Counter[str](), 0
    for number, row in enumerate(train):
        if number in reasons:
            continue
        if section.redact:
            row, found_words = redact_row(row)
            counts.update(found_words)
            redacted_rows += bool(found_words)
        rows.append(row)
    dropped = [
        Dropped(train[number].where, tuple(dict.fromkeys(kinds)), _shown(train[number], section))
        for number, kinds in sorted(reasons.items())
    ]
    return Cleaned(rows, dropped, dict(counts), redacted_rows)


def _refusal(found: Finding) -> DataError:
    shown = "".join(f"\n         {example.where}: {example.excerpt} ({example.why})" for example in found.examples)
    return DataError(
        expected=f"no {found.kind.replace('_', ' ')} (data.quality.{found.kind}=stop)",
        found=f"{found.count}{', for example' if shown else ''}{shown}",
        fix=found.advice,
    )


def _shown(row: Row, section: Quality) -> str:
    return redact(text_of(row))[0] if section.redact else text_of(row)


def redact_row(row: Row) -> tuple[Row, dict[str, int]]:
    """`row` with words in the place of personal data, and how many pieces of each kind there were.

    Where a row has a text of its own, that text is changed, and everything around it stays: instructions are the
    recipe's, and held-out rows are asked with them as they are. Labels stay as well.
    """
    counts: Counter[str] = Counter()
    if row.text is None:
        messages = [_redacted(message, counts) for message in row.messages]
        if row.label is not None:
            messages[-1] = row.messages[-1]
        return (replace(row, messages=tuple(messages)), dict(counts)) if counts else (row, {})
    text, words = redact(row.text)
    counts.update(words)
    *before, question = row.prompt
    earlier = [_redacted(message, counts) if message["role"] != "system" else message for message in before]
    if words:
        question = {**question, "content": question["content"].replace(row.text, text)}
    answer = row.messages[-1] if row.label is not None else _redacted(row.messages[-1], counts)
    return (replace(row, messages=(*earlier, question, answer), text=text), dict(counts)) if counts else (row, {})


def _redacted(message: Message, counts: Counter[str]) -> Message:
    content, words = redact(message["content"])
    counts.update(words)
    return {**message, "content": content}
