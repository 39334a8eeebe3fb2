"""The fields of a stored record: found by name or path, put together by a template, unfolded from nested lists."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ift_peft.errors import DataError, IftPeftError
from ift_peft.stages import HOLE


@dataclass(frozen=True)
class Record:
    """One row as stored: column to value, and where it stood (`file:line`, or `file row n`)."""

    values: dict[str, Any]
    where: str


class RecordFault(Exception):
    """What is wrong with one record: expected, found, fix."""


def kind(value: Any) -> str:
    """The type of a stored value, as faults call it."""
    return "nothing" if value is None else type(value).__name__


def string(values: dict[str, Any], key: str) -> str:
    """The text under `key`. Raises `RecordFault` for anything else."""
    value = values.get(key)
    if not isinstance(value, str):
        raise RecordFault(f"text under {key!r}", kind(value), f"set {key!r} to a string")
    return value


def cell(values: dict[str, Any], column: str | int) -> Any:
    """The value of a column: under that very name, else at that path through objects and lists, as `answers.0.text`.

    Raises `RecordFault` where there is neither, and for NaN and infinity, as which some tools store what is missing.
    """
    value = _cell(values, str(column))
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordFault(f"a value under {column!r}", str(value), "fill or remove the row")
    return value


def _cell(values: dict[str, Any], key: str) -> Any:
    if key in values:
        return values[key]
    first, *rest = parts = key.split(".")
    if not rest or first not in values:
        near = _nearest(key, [*values, *(".".join((str(name), *rest)) for name in values)])
        raise RecordFault(
            f"a column {key!r}",
            f"columns {', '.join(map(str, values)):.300}",
            f"did you mean {near!r}?" if near else "set data.columns, or data.header=false for a file without a header",
        )
    value: Any = values
    for at, part in enumerate(parts):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise _lost(value, parts, at)
    return value


def _lost(value: Any, parts: list[str], at: int) -> RecordFault:
    """The fault of a path that leads nowhere from `value`, which the first `at` of its parts led to."""
    path, way = ".".join(parts), ".".join(parts[:at])
    found = f"{kind(value)} under {way!r}"
    if isinstance(value, dict):
        near = _nearest(parts[at], value)
        found = f"fields {', '.join(map(str, value))} under {way!r}"
        fix = f"did you mean {'.'.join((*parts[:at], near, *parts[at + 1 :]))!r}?" if near else "name one of them"
    elif isinstance(value, list) and value:
        found = f"elements 0 to {len(value) - 1} under {way!r}"
        fix = f"number the element from 0, as in {f'{way}.0'!r}"
    elif isinstance(value, list):
        found, fix = f"no elements under {way!r}", "fill or remove the row"
    else:
        fix = "fill or remove the row" if value is None else f"end the path there: {way!r}"
    return RecordFault(f"a value at {path!r}", found, fix)


def text_of(values: dict[str, Any], column: str | int) -> str:
    """The text of a row: the column of that very name or path, else a template over several, `{title}\\n{body}`.

    Braces inside the values stay as they are. Raises `RecordFault` for what is missing, no text, or empty.
    """
    key = str(column)
    names = [] if key in values else HOLE.findall(key)
    if not names:
        value = cell(values, column)
        if not isinstance(value, str):
            raise RecordFault(f"text under {column!r}", kind(value), "choose the column that holds the text")
        if not value.strip():
            raise RecordFault(f"text under {column!r}", "an empty cell", "fill or remove the row")
        return value
    filled = {name: filled_with(values, name) for name in names}
    if not any(value.strip() for value in filled.values()):
        raise RecordFault(f"text under {' or '.join(map(repr, filled))}", "empty cells", "fill or remove the row")
    return HOLE.sub(lambda hole: filled[hole[1]], key)


def filled_with(values: dict[str, Any], name: str) -> str:
    """What a template puts in the place of `name`: text, which may be empty, or a number. Raises `RecordFault`."""
    value = cell(values, name)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RecordFault(
            f"text or a number under {name!r}, for the template in data.columns",
            kind(value),
            "fill or remove the row" if value is None else "name a field that holds text",
        )
    return str(value)


def unfold(records: Iterable[Record], path: str, faults: list[IftPeftError]) -> Iterator[Record]:
    """The records in the lists at `path` inside each record, as `paragraphs.qas`; an empty list holds none.

    Fields on the way there are inherited unless the inner record has its own. An inner record stands at
    `file row 3 paragraphs.0.qas.2`. A record without such a list is appended to `faults`.
    """
    names = path.split(".")
    for at in range(len(names)):
        records = _unfold_once(records, names, at, faults)
    yield from records


def _unfold_once(records: Iterable[Record], names: list[str], at: int, faults: list[IftPeftError]) -> Iterator[Record]:
    name = names[at]
    for record in records:
        inner = record.values.get(name)
        if isinstance(inner, list):
            elements = [(f"{name}.{index}", element) for index, element in enumerate(inner)]
        elif isinstance(inner, dict) and at < len(names) - 1:
            elements = [(name, inner)]
        else:
            faults.append(_no_list(record, names, at))
            continue
        inherited = {field: value for field, value in record.values.items() if field != name}
        for place, element in elements:
            where = f"{record.where}{'.' if at else ' '}{place}"
            if isinstance(element, dict):
                own = {field: value for field, value in inherited.items() if field not in element}
                yield Record({**element, **own}, where)
            else:
                faults.append(
                    DataError(
                        expected=f"objects in {name!r} (data.records={'.'.join(names)})",
                        found=f"{kind(element)} at {where}",
                        fix="name a list of objects, or set data.records=null to take each record as one row",
                    )
                )


def _no_list(record: Record, names: list[str], at: int) -> DataError:
    """The fault of a record without the list that the part `at` of data.records names."""
    name, values = names[at], record.values
    lists = [str(field) for field, value in values.items() if isinstance(value, list)]
    near = _nearest(name, lists)
    inside = values.get(name)
    deeper = (
        [str(field) for field, value in inside.items() if isinstance(value, list)] if isinstance(inside, dict) else []
    )
    if deeper:
        fix = f"go on to a list in it: data.records={'.'.join((*names, deeper[0]))}"
    elif at == 0 and names[1:] and names[1] in lists:  # the list around all records is taken off when a file is read
        fix = f"did you mean data.records={'.'.join(names[1:])}?"
    elif near:
        fix = f"did you mean data.records={'.'.join((*names[:at], near, *names[at + 1 :]))}?"
    elif lists:
        fix = f"name a list out of {', '.join(lists)}: data.records={'.'.join((*names[:at], lists[0]))}"
    elif at:
        fix = f"end the path there: data.records={'.'.join(names[:at])}"
    else:
        fix = "fill or remove the row, or set data.records=null to take each record as one row"
    found = f"{kind(inside)} under {name!r}" if name in values else f"fields {', '.join(map(str, values))}"
    return DataError(
        expected=f"a list {name!r} (data.records={'.'.join(names)})", found=f"{found} at {record.where}", fix=fix
    )


def _nearest(name: str, known: Iterable[Any]) -> str | None:
    return next(iter(difflib.get_close_matches(name, [str(one) for one in known], n=1)), None)
