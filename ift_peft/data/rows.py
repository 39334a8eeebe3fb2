"""All rows of a recipe: read, checked, split, sampled."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ift_peft.data.formats import to_rows
from ift_peft.data.row import Row
from ift_peft.data.sources import folder_has_split, read_source
from ift_peft.errors import DataError, IftPeftError, raise_all
from ift_peft.sections import Data

SHOWN_FAULTS = 20


def read_rows(data: Data) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows of a recipe.

    Raises `Faults` naming every record that cannot be used, by file and line, before anything else is done with them.
    """
    faults: list[IftPeftError] = []
    train: list[Row] = []
    held_out: list[list[Row]] = []
    for number, (part, _) in enumerate(data.by_source()):
        rows = _read(part, part.train, part.train_split, faults)
        if not rows and not faults:
            faults.append(_nothing("training", part.train))
        train += [replace(row, source=number) for row in rows] if number else rows
        tests = _read_test(part, faults)
        if tests is not None:
            held_out.append([replace(row, source=number) for row in tests])
    if data.sources and data.test is not None:
        held_out.append(_read(data, data.test, data.test_split, faults))
    test = [row for rows in held_out for row in rows] if held_out else None
    if not faults and test is not None and not test:
        faults.append(_nothing("held-out", data.test or data.train))
    both = sorted({row.where for row in train} & {row.where for row in test or ()})
    if both:
        faults.append(
            DataError(
                expected="training and held-out rows from different files",
                found=f"{len(both)} rows in both, the first at {both[0]}",
                fix="name the files: data.train=… data.test=…",
            )
        )
    raise_faults(faults)
    if test is None:
        train, test = split_rows(train, test_size=data.test_size, seed=data.seed)
    return _sample(train, data.max_train_rows, data.seed), _sample(test, data.max_test_rows, data.seed)


def read_rows_of(data: Data) -> list[Row]:
    """Every row of `data.train` alone, unsplit. Raises `Faults` like `read_rows`."""
    faults: list[IftPeftError] = []
    rows = _read(data, data.train, data.train_split, faults)
    if not faults and not rows:
        faults.append(_nothing("", data.train))
    raise_faults(faults)
    return rows


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


def raise_faults(faults: Sequence[IftPeftError]) -> None:
    """Raise all faults as one error; beyond the first few only their number is told."""
    shown = list(faults[:SHOWN_FAULTS])
    if len(faults) > SHOWN_FAULTS:
        shown.append(
            DataError(
                expected="usable rows",
                found=f"{len(faults) - SHOWN_FAULTS} more faults like these",
                fix="repair these first",
            )
        )
    raise_all(shown)


def split_rows(rows: Sequence[Row], *, test_size: float | int, seed: int) -> tuple[list[Row], list[Row]]:
    """Set rows aside for testing: a share of each label, equal prompts always on the same side.

    `test_size` below 1 is a share of the rows, from 1 on their number. Raises `DataError` where nothing would be left
    on either side.
    """
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple((message["role"], message["content"]) for message in row.prompt)].append(row)
    strata: dict[str | None, list[list[Row]]] = defaultdict(list)
    for group in groups.values():
        strata[group[0].label].append(group)
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
        raise DataError(
            expected="rows on both sides of the split",
            found=f"{len(train)} to train on and {len(test)} to test on, of {len(rows)}",
            fix="change data.test_size, or name a file as data.test",
        )
    return train, test


def _sample(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    if limit is None or limit >= len(rows):
        return rows
    kept = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[index] for index in kept]
