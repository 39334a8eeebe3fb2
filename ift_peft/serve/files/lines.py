"""Rows to train on, checked line by line as they arrive: what is accepted here, training reads.

A row is `{"messages": [...]}` or `{"prompt": …, "completion": …}`, one form in a file. Lines end in a line feed; blank
ones are passed over, as long as the lines are at most twice the rows that a file may have, and so is a byte order mark
at the start, as by the reader of training. Faults name lines, bytes and fields, never what a row says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from ift_peft.data.fields import Record, RecordFault
from ift_peft.data.formats import to_row
from ift_peft.data.json_files import repeated_key
from ift_peft.sections import Data
from ift_peft.serve.settings import Limits

SHOWN = 20
MOST = 1000  # lines with faults, after which the others are not looked at
ROLES = ("system", "user", "assistant")
NOT_LEARNT = {
    "weight": "every assistant message is learnt; leave those out that should not be",
    "name": "there is no place for it in a prompt; write it into the content",
    "function_call": "function calls are not trained on",
    "tool_calls": "tool calls are not trained on",
    "tool_call_id": "tool calls are not trained on",
    "refusal": "write it as content",
    "audio": "only text is trained on",
    "tools": "tools are not trained on",
    "functions": "functions are not trained on",
    "parallel_tool_calls": "tools are not trained on",
}
_BOM = b"\xef\xbb\xbf"
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)


class LineFault(Exception):
    """What is wrong with one line; the text holds nothing of its content but names of fields."""


class LineChecker:
    """Checks the lines of a file given in pieces. `faults` are the first of them, by line; `faulty` counts them all."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.faults: list[tuple[int | None, str]] = []
        self.faulty = self.rows = self.bytes = 0
        self.form: str | None = None
        self._line = bytearray()
        self._number = 1
        self._skipping = False  # the rest of a line that is too long
        self._stopped = False  # nothing more is looked at

    def feed(self, piece: bytes) -> None:
        """Take the next bytes of the file."""
        self.bytes += len(piece)
        start, most = 0, 2 * self.limits.rows
        while not self._stopped and (end := piece.find(b"\n", start)) >= 0:
            if self._number > most:
                self._fault(self._number, f"more than {most:,} lines, most of them blank")
                self._stopped = True
            elif end == start and not self._line and not self._skipping:
                self._number += 1
            else:
                self._extend(piece[start:end])
                self._end_line()
            start = end + 1
        if not self._stopped:
            self._extend(piece[start:])

    def close(self) -> None:
        """The file has ended."""
        self._end_line()
        if self.rows < self.limits.min_examples and not self.faulty:
            self._fault(None, f"expected at least {self.limits.min_examples} examples; found {self.rows}")

    @property
    def message(self) -> str:
        """All that is wrong, in one text; empty where nothing is."""
        if not self.faults:
            return ""
        told = "; ".join(text if line is None else f"line {line}: {text}" for line, text in self.faults)
        more = self.faulty - len(self.faults)
        after = f"; and {more}{' or more' if self._stopped else ''} lines more like these" if more > 0 else ""
        return f"The file cannot be trained on. {told}{after}."

    def _extend(self, piece: bytes) -> None:
        if self._skipping or self._stopped:
            return
        if len(self._line) + len(piece) > self.limits.line_bytes:
            self._fault(self._number, f"longer than {self.limits.line_bytes:,} bytes")
            self._line.clear()
            self._skipping = True
        else:
            self._line += piece

    def _end_line(self) -> None:
        if not self._skipping and not self._stopped:
            line = bytes(self._line.removeprefix(_BOM) if self._number == 1 else self._line)
            if line.strip():
                self._check(line)
        self._line.clear()
        self._number += 1
        self._skipping = False

    def _check(self, line: bytes) -> None:
        self.rows += 1
        if self.rows == self.limits.rows + 1:
            self._fault(self._number, f"more than {self.limits.rows:,} rows")
            self._stopped = True
            return
        try:
            form = check_line(line, depth=self.limits.depth)
            self.form = self.form or form
            if form != self.form:
                raise LineFault(f"{form} in a file whose first row is {self.form}; one form a file")
        except LineFault as fault:
            self._fault(self._number, str(fault))

    def _fault(self, line: int | None, text: str) -> None:
        self.faulty += 1
        self._stopped = self.faulty >= MOST
        if len(self.faults) < SHOWN:
            self.faults.append((line, text))


def check_line(line: bytes, *, depth: int) -> str:
    """The form of the row in `line`: `messages` or `prompt and completion`. Raises `LineFault`, and nothing else."""
    values = parse(line, depth=depth)
    if not isinstance(values, dict):
        raise LineFault(f"expected a JSON object; found {_kind(values)}")
    for text in _texts(values) if b"\\u" in line else ():  # nothing else can bring them in
        if wrong := _NO_TEXT.search(text):
            raise LineFault("holds the character U+0000" if wrong[0] == "\0" else "holds half of a surrogate pair")
    if "messages" in values:
        _known(values, ("messages",), "the row")
        _check_messages(values["messages"])
        form, spelled = "messages", "messages"
    elif "prompt" in values or "completion" in values:
        _known(values, ("prompt", "completion"), "the row")
        for name in ("prompt", "completion"):
            _text(values.get(name), name)
        form, spelled = "prompt_completion", "prompt and completion"
    else:
        _known(values, (), "the row")
        raise LineFault("expected messages, or prompt and completion; found neither")
    try:
        to_row(Record(values, "the line"), _section(form))
    except RecordFault as fault:
        expected, found, fix = fault.args
        raise LineFault(f"expected {expected}; found {found}; {fix}") from None
    return spelled


def parse(line: bytes, *, depth: int) -> Any:
    """The value of a line of strict JSON in UTF-8. Raises `LineFault`.

    Refused, although Python's parser takes them: NaN and Infinity, a key twice in an object; and more than `depth`
    objects and lists inside each other, before anything is parsed.
    """
    if b"\0" in line:
        raise LineFault(f"a NUL at byte {line.index(0) + 1}")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"{line[error.start]:#04x} at byte {error.start + 1}"
        raise LineFault(f"expected UTF-8; found {byte}; iconv -f GB18030 -t UTF-8 helps most files") from None
    if line.count(b"[") + line.count(b"{") > depth and _deepest(line) > depth:
        raise LineFault(f"more than {depth} objects and lists inside each other")
    try:
        return json.loads(text, parse_constant=_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise LineFault(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError:
        raise LineFault("not JSON: a number with too many digits") from None


def _deepest(line: bytes) -> int:
    deepest = depth = 0
    for found in _BRACKETS.finditer(line):
        if found[0] in (b"[", b"{"):
            depth += 1
            deepest = max(deepest, depth)
        elif found[0] in (b"]", b"}"):
            depth -= 1
    return deepest


def _constant(name: str) -> Any:
    raise LineFault(f"not JSON: {name}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated_key(pairs)
    if twice is not None:
        raise LineFault(f"{shown(twice)} twice in one object")
    return dict(pairs)


def _texts(value: Any) -> Iterator[str]:
    """Every string in a parsed value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            yield key
            yield from _texts(one)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise LineFault(f"expected messages to be a list of {{role, content}}; found {_kind(messages)}")
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise LineFault(f"{where}: expected an object; found {_kind(message)}")
        _known(message, ("role", "content"), where)
        role = message.get("role")
        if role not in ROLES:
            raise LineFault(f"{where}: {_unknown_role(role)}")
        _text(message.get("content"), f"{where}: content")


def _unknown_role(role: Any) -> str:
    if role == "developer":
        return "the role developer; call it system"
    if role in ("tool", "function"):
        return f"the role {role}; tool calls are not trained on"
    return f"expected role to be one of {', '.join(ROLES)}; found {'another' if isinstance(role, str) else _kind(role)}"


def _text(value: Any, what: str) -> None:
    if isinstance(value, list):
        raise LineFault(f"{what}: a list of parts; only text is trained on, no images, sound or files")
    if not isinstance(value, str):
        raise LineFault(f"{what}: expected text; found {_kind(value)}")
    if not value.strip():
        raise LineFault(f"{what}: expected text; found none")


def _known(values: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    for key in values:
        if key in NOT_LEARNT:
            raise LineFault(f"{where}: {key}: {NOT_LEARNT[key]}")
    unknown = [key for key in values if key not in names]
    if unknown and names:
        raise LineFault(f"{where}: {shown(unknown[0])} is not a field of it")


def shown(name: str) -> str:
    """A field's name as it may be told: short, and in plain characters where it is not a word."""
    short = name if len(name) <= 40 else f"{name[:40]}…"
    return short if short.isidentifier() else ascii(short)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    return "text" if isinstance(value, str) else "true or false" if isinstance(value, bool) else "a number"


@cache
def _section(form: str) -> Data:
    return Data(train="upload.jsonl", format="messages" if form == "messages" else "prompt_completion")
