"""Records of JSON files: an object on each line, or one list of objects. Strict JSON alone is taken."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from ift_peft.data.fields import Record
from ift_peft.data.lines import lines_of, not_utf8, other_encoding
from ift_peft.errors import DataError, IftPeftError
from ift_peft.plain_files import MiB

TIMES_IN_MEMORY = 8  # a JSON file's size, when it is parsed: its bytes, its text, and the values made of it


def read_jsonl(path: Path, faults: list[IftPeftError]) -> Iterator[Record]:
    """The object of each line that is not blank; lines that hold none are appended to `faults` and left out."""
    for number, line in lines_of(path, faults):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = _parse(line)
        except (ValueError, RecursionError) as error:
            faults.append(
                DataError(
                    expected="one JSON object a line",
                    found=f"{_told(error, line)} at {where}",
                    fix="repair or remove the line",
                )
            )
            continue
        if isinstance(values, dict):
            yield Record(values, where)
        else:
            faults.append(
                DataError(
                    expected="a JSON object",
                    found=f"{type(values).__name__} at {where}",
                    fix='write {"text": …, "label": …}',
                )
            )


def read_json(path: Path, faults: list[IftPeftError]) -> Iterator[Record]:
    """The objects of the file's one list; what is no list of objects is appended to `faults`."""
    try:
        values = _parse(_json_text(path))
    except DataError as error:
        faults.append(error)
        return
    except json.JSONDecodeError as error:
        faults.append(
            DataError(
                expected="a JSON list of objects",
                found=f"{error.msg} at {path}:{error.lineno}",
                fix="repair it there; a file with one object a line is named .jsonl",
            )
        )
        return
    except (ValueError, RecursionError) as error:
        faults.append(
            DataError(expected="a JSON list of objects", found=f"{_told(error, '')} in {path}", fix="repair the file")
        )
        return
    if isinstance(values, dict):  # {"data": [...]} and the like: the one list inside
        lists = [value for value in values.values() if isinstance(value, list)]
        values = lists[0] if len(lists) == 1 else values
    if not isinstance(values, list):
        found = "an object" if isinstance(values, dict) else type(values).__name__
        faults.append(
            DataError(expected="a JSON list of objects", found=f"{found} in {path}", fix="wrap the rows in a list")
        )
        return
    for index, row in enumerate(values, start=1):
        where = f"{path} row {index}"
        if isinstance(row, dict):
            yield Record(row, where)
        else:
            faults.append(
                DataError(expected="a JSON object", found=f"{type(row).__name__} at {where}", fix="repair the row")
            )


def _json_text(path: Path) -> str:
    """The text of a file that is one value, and so in memory as a whole. Raises `DataError`."""
    size, free = path.stat().st_size, psutil.virtual_memory().available
    if size * TIMES_IN_MEMORY > free:
        raise DataError(
            expected=f"a JSON file of at most {free // TIMES_IN_MEMORY // MiB:,} MiB, which memory allows for",
            found=f"{size // MiB:,} MiB in {path}",
            fix="write one object a line into a .jsonl file, which is read piece by piece",
        )
    content = path.read_bytes()
    if fault := other_encoding(path, content[:4]):
        raise fault
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        number, at = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise not_utf8(error.object[error.start : error.start + 1], at, f"{path}:{number}") from None


def _parse(text: str) -> Any:
    """A value of strict JSON. Raises `ValueError` or `RecursionError`."""
    return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_once)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large for a number")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated_key(pairs)
    if twice is not None:
        raise ValueError(f"{twice[:60]!a} twice in one object")
    return dict(pairs)


def repeated_key(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """The first key to stand in an object again, if one does: of two values one would be lost."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return None


def _told(error: ValueError | RecursionError, text: str) -> str:
    """What is wrong with a line or file of JSON, by what the user can see of it."""
    if isinstance(error, RecursionError):
        return "lists and objects nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        lone = "\r" in text.strip() and "\n" not in text.strip()
        return f"{error.msg} (lines end in CR alone: save it with LF)" if lone else str(error)
    return "a number with too many digits" if "set_int_max_str_digits" in str(error) else str(error)
