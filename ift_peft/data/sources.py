"""Where rows come from: a file, a folder, or a Hub id, each read into records that know the line they stood on."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ift_peft.errors import DataError, IftPeftError, first_line
from ift_peft.sections import DATA_SUFFIXES

PIECE = 1000  # rows of a Parquet file that are decoded together
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class Record:
    """One row as stored: column to value, and where it stood (`file:line`, or `file row n`)."""

    values: dict[str, Any]
    where: str


def read_source(source: str, faults: list[IftPeftError], *, split: str = "train", header: bool = True) -> list[Record]:
    """Every record of `source`; what cannot be read is appended to `faults` by file and line, and reading goes on."""
    return list(iter_source(source, faults, split=split, header=header))


def iter_source(
    source: str, faults: list[IftPeftError], *, split: str = "train", header: bool = True
) -> Iterator[Record]:
    """The records of `read_source`, one by one; only a JSON file, which is one value, is in memory as a whole."""
    path = Path(source)
    if path.is_file():
        yield from _read_file(path, faults, header=header)
        return
    if path.is_dir():
        yield from _read_folder(path, faults, split=split, header=header)
        return
    if _HUB_ID.match(source) and path.suffix not in DATA_SUFFIXES:
        yield from _read_hub(source, faults, split=split)
        return
    faults.append(
        DataError(
            expected="data.train and data.test to name a file, a folder or a Hub id",
            found=f"nothing at {source}",
            fix="check the path; a recipe's is relative to its file, an override's to the working directory",
        )
    )


def text_lines(path: Path, *, setting: str) -> list[str]:
    """The lines of a text file that are not blank. Raises `DataError` naming the recipe's `setting`."""
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            expected=f"{setting} to be a readable file in UTF-8",
            found=f"{first_line(error)} ({path})",
            fix="check the path; a recipe's is relative to its file, an override's to the working directory",
        ) from None


def folder_has_split(source: str, split: str) -> bool:
    """Whether `source` is a folder with files of its own for `split`."""
    path = Path(source)
    return path.is_dir() and bool(_split_files(path, split))


def _split_files(folder: Path, split: str) -> list[Path]:
    return [path for path in _data_files(folder) if re.match(rf"{re.escape(split)}(?![a-z])", path.stem, re.IGNORECASE)]


def _data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in DATA_SUFFIXES[:-1])


def _read_folder(folder: Path, faults: list[IftPeftError], *, split: str, header: bool) -> Iterator[Record]:
    """The files named after `split` where there are any, else every data file."""
    files = _split_files(folder, split) or _data_files(folder)
    if not files:
        faults.append(
            DataError(
                expected=f"files ending in {', '.join(DATA_SUFFIXES[:-1])} in {folder}",
                found="none",
                fix="check the folder",
            )
        )
    for path in files:
        yield from _read_file(path, faults, header=header)


def _read_file(path: Path, faults: list[IftPeftError], *, header: bool) -> Iterator[Record]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        yield from _read_jsonl(path, faults)
    elif suffix == ".json":
        yield from _read_json(path, faults)
    elif suffix in (".csv", ".tsv", ".txt"):
        yield from _read_table(path, faults, delimiter="," if suffix == ".csv" else "\t", header=header)
    elif suffix == ".parquet":
        yield from _read_parquet(path, faults)
    else:
        faults.append(
            DataError(
                expected=f"a file ending in {', '.join(DATA_SUFFIXES)}",
                found=str(path),
                fix="convert it, or rename it to what it is",
            )
        )


def _lines(path: Path, faults: list[IftPeftError]) -> Iterator[tuple[int, str]]:
    """Line number and text; lines that are not UTF-8 are named and left out."""
    with path.open("rb") as raw:
        for number, line in enumerate(raw, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                faults.append(
                    DataError(
                        expected="UTF-8 text",
                        found=f"byte {line[error.start]:#04x} at {path}:{number}, byte {error.start + 1} of the line",
                        fix="save the file as UTF-8 (iconv -f GB18030 -t UTF-8 turns most Chinese files into it)",
                    )
                )


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _read_jsonl(path: Path, faults: list[IftPeftError]) -> Iterator[Record]:
    for number, line in _lines(path, faults):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            faults.append(
                DataError(
                    expected="one JSON object a line", found=f"{error} at {where}", fix="repair or remove the line"
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


def _read_json(path: Path, faults: list[IftPeftError]) -> Iterator[Record]:
    text = "".join(line for _, line in _lines(path, faults))
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
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
        faults.append(DataError(expected="a JSON list of objects", found=f"{error} in {path}", fix="repair the file"))
        return
    if isinstance(values, dict):  # {"data": [...]} and the like: the one list inside
        lists = [value for value in values.values() if isinstance(value, list)]
        values = lists[0] if len(lists) == 1 else values
    if not isinstance(values, list):
        faults.append(
            DataError(expected="a JSON list of objects", found=f"an object in {path}", fix="wrap the rows in a list")
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


def _read_table(path: Path, faults: list[IftPeftError], *, delimiter: str, header: bool) -> Iterator[Record]:
    """CSV with quoting; tab-separated files are taken literally, as quotes in them are ordinary characters."""
    lines = (line for _, line in _lines(path, faults))
    reader = csv.reader(
        lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE, strict=True
    )
    names: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            faults.append(
                DataError(expected="valid CSV", found=f"{error} at {path}:{start}", fix="check the quotes there")
            )
            return
        if not cells:
            continue
        if names is None:
            names = [cell.strip() for cell in cells] if header else [str(i) for i in range(len(cells))]
            if len(set(names)) < len(names):
                faults.append(
                    DataError(
                        expected="each column name once",
                        found=f"{', '.join(names)} at {path}:{start}",
                        fix="rename one",
                    )
                )
                return
            if header:
                continue
        if len(cells) != len(names):
            faults.append(
                DataError(
                    expected=f"{len(names)} columns ({', '.join(names)})",
                    found=f"{len(cells)} at {path}:{start}",
                    fix="quote cells that hold the delimiter" if delimiter == "," else "remove tabs inside cells",
                )
            )
            continue
        yield Record(dict(zip(names, cells, strict=True)), f"{path}:{start}")


def _read_parquet(path: Path, faults: list[IftPeftError]) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PIECE):
                for row in batch.to_pylist():
                    index += 1
                    yield Record(row, f"{path} row {index}")
    except (OSError, pyarrow.ArrowException) as error:
        faults.append(DataError(expected="a Parquet file", found=f"{error} in {path}", fix="write it again"))


def _read_hub(name: str, faults: list[IftPeftError], *, split: str) -> Iterator[Record]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many unrelated types; each is told to the user, none is lost
        faults.append(
            DataError(
                expected=f"the data set {name} on the Hub or in its cache, with a split {split!r}",
                found=first_line(error),
                fix="check id, split and network; a local file or folder is given by its path",
            )
        )
        return
    for index, row in enumerate(rows, start=1):
        yield Record(dict(row), f"{name}[{split}] row {index}")
