"""All rows of a recipe: read, checked, split, sampled."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

from ift_peft.data.formats import to_rows
from ift_peft.data.row import Row
from ift_peft.data.sources import folder_has_split, iter_source, read_source
from ift_peft.errors import DataError, IftPeftError, raise_all
from ift_peft.plain_files import NOT_TEXT
from ift_peft.sections import Data
from ift_peft.selection import Validation

T = TypeVar("T")
SHOWN_FAULTS = 20
MOST_FAULTS = 1000  # a stream is not read to its end with more than these
PIECE = 1000  # records of a stream that are read together


def read_rows(data: Data) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows of a recipe.

    Raises `Faults` naming every record that cannot be used, by file and line, before anything else is done with them.
    """
    faults: list[IftPeftError] = []
    train: list[Row] = []
    for number, (part, _) in enumerate(data.by_source()):
        rows = _read(part, part.train, part.train_split, faults)
        if not rows and not faults:
            faults.append(_nothing("training", part.train))
        if data.sources:
            rows = sampled(rows, data.sources[number].max_train_rows, data.seed)
        train += [replace(row, source=number) for row in rows] if number else rows
    held_out = _held_out(data, faults)
    test = [row for rows in held_out for row in rows] if held_out else None
    if not faults and test is not None and not test:
        faults.append(_nothing("held-out", data.test or data.train))
    both = sorted({row.where for row in train} & {row.where for row in test or ()})
    if both:
        faults.append(_in_both(both))
    raise_faults(faults)
    if test is None:
        train, test = split_rows(train, test_size=data.test_size, seed=data.seed)
    return sampled(train, data.max_train_rows, data.seed), sampled(test, data.max_test_rows, data.seed)


def read_rows_of(data: Data, source: str | None = None, *, like: int | None = None) -> list[Row]:
    """Every row of `source` (by default `data.train`), unsplit, read as new texts are, or `like` those of a source.

    Raises `Faults` like `read_rows`.
    """
    train = source or data.train
    faults: list[IftPeftError] = []
    section, number = data.new_texts_of(like)
    rows = [replace(row, source=number) for row in _read(section, train, data.train_split, faults)]
    if not faults and not rows:
        faults.append(_nothing("", train))
    raise_faults(faults)
    return rows


def stream_rows(data: Data, *, held_out: Collection[str] = ()) -> Iterator[Row]:
    """The training rows of a recipe, read piece by piece, in the order in which `read_rows` has them.

    `held_out` are the places of held-out rows, which must not be among them. Raises `Faults` naming the records that
    cannot be used when all are read, or as soon as there are very many.
    """
    faults: list[IftPeftError] = []
    for number, (part, _) in enumerate(data.by_source()):
        assert part.train is not None
        records = iter_source(part.train, faults, split=part.train_split, header=part.header)
        found = 0
        while piece := list(islice(records, PIECE)):
            for row in to_rows(piece, part, faults):
                if row.where in held_out:
                    raise _in_both([row.where])
                found += 1
                yield replace(row, source=number) if number else row
            if len(faults) > MOST_FAULTS:
                raise_faults(faults)
        if not found and not faults:
            faults.append(_nothing("training", part.train))
    raise_faults(faults)


def held_out_rows(data: Data) -> list[Row]:
    """The held-out rows that a recipe names. Raises `Faults` like `read_rows`."""
    faults: list[IftPeftError] = []
    rows = [row for rows in _held_out(data, faults) for row in rows]
    if not faults and not rows:
        faults.append(_nothing("held-out", data.test))
    raise_faults(faults)
    return sampled(rows, data.max_test_rows, data.seed)


def _held_out(data: Data, faults: list[IftPeftError]) -> list[list[Row]]:
    held_out = []
    for number, (part, _) in enumerate(data.by_source()):
        tests = _read_test(part, faults)
        if tests is not None:
            held_out.append([replace(row, source=number) for row in tests] if number else tests)
    if data.sources and data.test is not None:
        section, number = data.for_new_texts
        rows = _read(section, data.test, data.test_split, faults)
        held_out.append([replace(row, source=number) for row in rows])
    return held_out


def _in_both(places: Sequence[str]) -> DataError:
    return DataError(
        expected="training and held-out rows from different files",
        found=f"{len(places)} rows in both, the first at {places[0]}",
        fix="name the files: data.train=… data.test=…",
    )


def to_saved(row: Row) -> dict[str, Any]:
    """A row as a JSON object, from which `from_saved` makes it again."""
    optional = {"label": row.label, "text": row.text, "source": row.source or None, "tests": row.tests}
    return {
        "messages": list(row.messages),
        "where": row.where,
        **{name: value for name, value in optional.items() if value is not None},
    }


def from_saved(values: dict[str, Any]) -> Row:
    """The row of an object that `to_saved` made. Raises `DataError` for one that it did not."""
    messages = values.get("messages") if isinstance(values, dict) else None
    whole = isinstance(messages, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    )
    if not whole or not isinstance(values.get("where"), str):
        raise DataError(
            expected="a row of {messages, where} as training saves it",
            found=f"{values!r:.120}",
            fix="restore the file in the folder of the run, or train again",
        )
    faults = [one["content"] for one in values["messages"] if NOT_TEXT.search(one["content"])]
    if faults:
        raise DataError(expected="whole characters", found=f"{faults[0]!a:.120}", fix="restore the file of the run")
    return Row(
        tuple(values["messages"]),
        values["where"],
        label=values.get("label"),
        text=values.get("text"),
        source=values.get("source", 0),
        tests=values.get("tests"),
    )


def _read(data: Data, source: str | None, split: str, faults: list[IftPeftError]) -> list[Row]:
    assert source is not None  # the section was validated
    return to_rows(read_source(source, faults, split=split, header=data.header), data, faults)


def _read_test(data: Data, faults: list[IftPeftError]) -> list[Row] | None:
    """The held-out rows that a source brings along, None where it brings none."""
    if data.test is not None:
        return _read(data, data.test, data.test_split, faults)
    if data.train is not None and folder_has_split(data.train, data.test_split):
        return _read(data, data.train, data.test_split, faults)
    return None


def _nothing(kind: str, source: str | None) -> DataError:
    return DataError(
        expected=f"at least one {kind} row".replace("  ", " "), found=f"none in {source}", fix="check the source"
    )


def raise_faults(faults: Sequence[IftPeftError], *, count: int | None = None) -> None:
    """Raise all faults as one error; beyond the first few only their number, `count` in all, is told."""
    count = len(faults) if count is None else count
    shown = list(faults[:SHOWN_FAULTS])
    if count > SHOWN_FAULTS:
        shown.append(
            DataError(
                expected="usable rows", found=f"{count - SHOWN_FAULTS} more faults like these", fix="repair these first"
            )
        )
    raise_all(shown)


def split_rows(
    rows: Sequence[Row], *, test_size: float | int, seed: int, setting: str = "data.test_size"
) -> tuple[list[Row], list[Row]]:
    """Set rows aside for testing: a share of each label of each source, equal prompts always on the same side.

    `test_size` below 1 is a share of the rows, from 1 on their number; `setting` is its name in a recipe. Raises
    `DataError` where nothing would be left on either side.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple((message["role"], message["content"]) for message in row.prompt)].append(row)
    strata: dict[tuple[int, str | None], list[list[Row]]] = defaultdict(list)
    for group in groups.values():
        strata[group[0].source, group[0].label].append(group)
    share = test_size if test_size < 1 else test_size / len(rows)
    rng = random.Random(seed)
    chosen: set[str] = set()
    exact = [share * sum(map(len, stratum)) for stratum in strata.values()]
    counts = [int(part) for part in exact]
    nearest = sorted(range(len(exact)), key=lambda at: counts[at] - exact[at])
    for at in nearest[: round(sum(exact)) - sum(counts)]:  # largest remainders
        counts[at] += 1
    for stratum, wanted in zip(strata.values(), counts, strict=True):
        taken = 0
        for group in rng.sample(stratum, len(stratum)):
            if taken >= wanted:
                break
            chosen.update(row.where for row in group)
            taken += len(group)
    train = [row for row in rows if row.where not in chosen]
    test = [row for row in rows if row.where in chosen]
    if not train or not test:
        same = len(groups) == 1
        cure = "give rows of other prompts" if same else f"change {setting}, or give more rows"
        raise DataError(
            expected="rows on both sides of the split",
            found=f"{len(train)} to train on and {len(test)} set aside, of {len(rows)}"
            + (": all prompts are equal" if same else ""),
            fix=cure + (", or name a file as data.test" if "test" in setting else ""),
        )
    return train, test


def sampled(rows: list[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` of `rows`, in their order; a smaller sample is part of a larger one."""
    if limit is None or limit >= len(rows):
        return rows
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    kept = sorted(order[:limit])
    return [rows[index] for index in kept]


def set_aside(rows: list[Row], section: Validation | None) -> tuple[list[Row], list[Row]]:
    """Training rows without those that are only validated on, and those: both as `data.quality` left them."""
    if section is None:
        return rows, []
    return split_rows(rows, test_size=section.size, seed=section.seed, setting="validation.size")
