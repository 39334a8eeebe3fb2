"""What a check finds: which rows, how bad it is, three examples, and what to do."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ift_peft.data.quality.personal_data import personal_data, without
from ift_peft.data.row import Row
from ift_peft.sections import Action, Quality

Severity = Literal["error", "warning", "note"]
SHOWN = 3
EXCERPT = 48  # characters of a row that an example shows

_SEVERITY: dict[str, Severity] = {
    "exact_duplicates": "note",
    "near_duplicates": "note",
    "leakage": "warning",
    "contradictions": "warning",
    "mislabelled": "warning",
    "overlong": "note",
    "imbalance": "warning",
    "characters": "warning",
    "language": "warning",
    "personal_data": "warning",
}
_ADVICE = {
    "exact_duplicates": "data.quality.exact_duplicates=drop keeps the first of each",
    "near_duplicates": "data.quality.near_duplicates=drop keeps the first of each; near_threshold says how near",
    "leakage": "scores on these held-out rows are too good: data.quality.leakage=drop leaves the training rows out",
    "contradictions": "correct the labels; data.quality.contradictions=drop leaves all these rows out",
    "mislabelled": "look at them, the surest are shown first; data.quality.mislabelled=drop leaves them out",
    "overlong": "raise training.max_length; data.overlong says what happens to them",
    "imbalance": "add rows of the rare classes; data.quality.imbalance_ratio says from when on it is told",
    "characters": "save the source as UTF-8 and clean it; data.quality.characters=drop leaves these rows out",
    "language": "data.quality.languages lists what rows may be in; data.quality.language=drop leaves others out",
    "personal_data": "data.quality.redact=true replaces it by [EMAIL], [PHONE], [ID] and [CARD]",
}
KINDS = tuple(_ADVICE)


@dataclass(frozen=True)
class Example:
    """A row that shows a finding: its origin, a piece of it without personal data, and what is wrong there."""

    where: str
    excerpt: str
    why: str


@dataclass(frozen=True)
class Hit:
    """One row that a check objects to; `at` is the character of `text` that an excerpt should show."""

    row: int
    why: str
    text: str = ""
    at: int = 0


@dataclass(frozen=True)
class Finding:
    """All that one check found. `rows` are numbers of training rows, ascending; `count` is what the table shows."""

    kind: str
    severity: Severity
    rows: tuple[int, ...]
    count: int
    examples: tuple[Example, ...]
    advice: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": list(self.rows), "examples": [asdict(example) for example in self.examples]}


def action_of(kind: str, section: Quality) -> Action:
    """What the section says to do with a kind of finding."""
    action: Action = getattr(section, kind)
    return action


def severity_of(kind: str, section: Quality) -> Severity:
    return "error" if action_of(kind, section) == "stop" else _SEVERITY[kind]


def finding(kind: str, hits: Sequence[Hit], train: Sequence[Row], section: Quality, *, advice: str = "") -> Finding:
    """The finding that `hits` make, most telling first; `advice` is said before the usual one."""
    rows = sorted({hit.row for hit in hits})
    examples = tuple(
        Example(train[hit.row].where, excerpt(hit.text or text_of(train[hit.row]), at=hit.at), hit.why)
        for hit in hits[:SHOWN]
    )
    told = f"{advice}; {_ADVICE[kind]}" if advice else _ADVICE[kind]
    return Finding(kind, severity_of(kind, section), tuple(rows), len(rows), examples, told)


def text_of(row: Row) -> str:
    """What a row is about: its text, or all that was said before its answer but for the system message."""
    if row.text is not None and not row.earlier:
        return row.text
    return "\n".join(message["content"] for message in row.prompt if message["role"] != "system")


def normal(text: str) -> str:
    """`text` without the differences that make no other text of it: width, case, white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def excerpt(text: str, *, at: int = 0) -> str:
    """A short piece of `text` around a character, on one line, without personal data, invisible characters shown."""
    start = max(0, at - EXCERPT // 3)
    end = start + EXCERPT
    piece = "".join(map(_visible, without(personal_data(text), text, start=start, end=end)))
    return ("…" if start else "") + " ".join(piece.split()) + ("…" if end < len(text) else "")


def _visible(character: str) -> str:
    invisible = unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs") and not character.isspace()
    return f"<U+{ord(character):04X}>" if invisible else character
