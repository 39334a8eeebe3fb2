"""The checks of lines against any bytes: they raise one kind of error, and take nothing that strict JSON refuses."""

from __future__ import annotations

import hashlib
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ift_peft.data.fields import Record
from ift_peft.data.formats import to_row
from ift_peft.sections import Data
from ift_peft.serve.files.lines import LineChecker, LineFault, check_line, parse
from ift_peft.serve.files.upload import Upload
from ift_peft.serve.settings import Limits

pytestmark = pytest.mark.slow

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", ""]), "content": st.text(max_size=6) | VALUES}
    ),
    max_size=4,
)
ROWS = st.builds(lambda turns: {"messages": turns}, TURNS) | st.fixed_dictionaries(
    {"prompt": st.text(max_size=5), "completion": st.text(max_size=5)}
)


def written(value: Any) -> bytes:
    return json.dumps(value).encode()


def twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return dict(pairs)


def refuse(name: str) -> Any:
    raise ValueError(name)


def strict(line: bytes) -> Any:
    """What a parser makes of it that knows the standard alone."""
    return json.loads(line.decode("utf-8"), parse_constant=refuse, object_pairs_hook=twice)


def test_blank_lines_are_passed_over_until_they_are_too_many() -> None:
    limits = Limits(rows=20, min_examples=1)
    row = b'{"prompt": "q", "completion": "a"}'
    for content, ends in ((b"\n" * 39 + row + b"\n", True), (b" \r\n" * 39 + row, True), (b"\n" * 41, False)):
        checker = LineChecker(limits)
        checker.feed(content)
        checker.close()
        assert (checker.message == "", checker.rows) == (ends, int(ends)), content
    assert "line 41: more than 40 lines" in checker.message


def test_nothing_is_looked_at_behind_the_line_that_ends_the_check() -> None:
    class Piece(bytes):
        found = 0

        def find(self, *arguments: Any) -> int:
            Piece.found += 1
            return super().find(*arguments)

    for line in (b"\n", b"{\n", b'{"prompt": "q", "completion": "a"}\n'):
        checker = LineChecker(Limits(rows=2_000))
        Piece.found = 0
        checker.feed(Piece(line * 20_000))
        checker.feed(Piece(line * 20_000))
        checker.close()
        assert checker.message and Piece.found <= 4_001, line
        assert checker.bytes == 40_000 * len(line)


@given(st.binary(max_size=200) | VALUES.map(written) | ROWS.map(written))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'{"messages": ' + b"1" * 5_000 + b"}")
@example(b'{"prompt": "\\ud83d\\ude00", "completion": "\\ud83d"}')
@example(b'"[[[[[[[[[[[[[[[[[[[[[["')
@example(b"\xef\xbb\xbf{}")
@settings(max_examples=300, deadline=None)
def test_a_line_is_taken_as_training_takes_it_or_refused_with_a_fault(line: bytes) -> None:
    try:
        form = check_line(line, depth=16)
    except LineFault:
        return
    values = strict(line)
    assert set(values) == ({"messages"} if form == "messages" else {"prompt", "completion"})
    row = to_row(Record(values, "a line"), Data(train="rows.jsonl"))
    assert row.messages[-1]["role"] == "assistant"
    assert all(message["content"].strip() and "\0" not in message["content"] for message in row.messages)
    json.dumps(values, ensure_ascii=False).encode()  # no half of a surrogate pair


@given(st.binary(max_size=80) | VALUES.map(written))
@example(b'{"a": 1, "a": 2}')
@example(b"[-Infinity]")
@settings(max_examples=300, deadline=None)
def test_parsing_is_that_of_the_standard_parser(line: bytes) -> None:
    try:
        found = parse(line, depth=16)
    except LineFault:
        return
    assert repr(found) == repr(strict(line))


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=6))
@example(b'{"prompt": "a", "completion": "b"}\n' * 8, [3, 40, 41, 42])
@settings(max_examples=150, deadline=None)
def test_how_the_bytes_arrive_changes_nothing(content: bytes, cuts: list[int]) -> None:
    limits = Limits(line_bytes=60, min_examples=2)
    whole, pieces = LineChecker(limits), LineChecker(limits)
    whole.feed(content)
    at = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    for start, end in pairwise(at):
        pieces.feed(content[start:end])
    for checker in (whole, pieces):
        checker.close()
    assert (whole.message, whole.rows, whole.form, whole.bytes) == (
        pieces.message,
        pieces.rows,
        pieces.form,
        pieces.bytes,
    )


@given(st.lists(st.integers(0, 900), max_size=8), st.sampled_from([b"\r\n", b"\n", b""]))
@settings(max_examples=60, deadline=None)
def test_how_a_form_arrives_changes_nothing(cuts: list[int], end: bytes) -> None:
    """Also where a row holds what looks like the boundary."""
    content = b'{"prompt": "--edge -- edge", "completion": "\\r\\n--edge--"}\n' * 10 + end
    part = b'Content-Disposition: form-data; name="%b"'
    body = b"--edge\r\n" + part % b"purpose" + b"\r\n\r\nfine-tune\r\n--edge\r\n"
    body += part % b"file" + b'; filename="rows.jsonl"\r\n\r\n' + content + b"\r\n--edge--\r\n"
    at = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    with tempfile.TemporaryDirectory() as folder:
        with Upload(Path(folder), "multipart/form-data; boundary=edge", Limits()) as upload:
            for start, stop in pairwise(at):
                upload.write(body[start:stop])
            upload.finish()
            assert upload.path.read_bytes() == content
            assert upload.sha256 == hashlib.sha256(content).hexdigest()
            assert (upload.filename, upload.checker.rows) == ("rows.jsonl", 10)
        assert not list(Path(folder).iterdir())


def test_memory_is_bounded_by_the_longest_line() -> None:
    checker = LineChecker(Limits(line_bytes=1_000))
    for _ in range(1_000):
        checker.feed(b"x" * 10_000)
        assert len(checker._line) <= 1_000
    checker.feed(b"\n" + b"\xff\n" * 5_000)
    checker.close()
    assert checker.faulty == 1_000, "after so many, the rest is not looked at"
    assert checker.message.startswith("The file cannot be trained on. line 1: longer than 1,000 bytes; line 2:")
    assert checker.message.endswith("; and 980 or more lines more like these.")


def test_depth_is_counted_outside_of_texts() -> None:
    line = b'{"a": [{"b": "\\"[[[[[{{{{"}]}'
    assert parse(line, depth=3) == strict(line)
    with pytest.raises(LineFault, match="more than 2"):
        parse(line, depth=2)
