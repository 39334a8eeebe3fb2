"""Where rows come from: a file, a folder, or a Hub id, each read into records that know the line they stood on."""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ift_peft.errors import DataError, IftPeftError, first_line, raise_all
from ift_peft.plain_files import MiB, is_file, is_folder, require_ordinary
from ift_peft.sections import DATA_SUFFIXES

PIECE = 1000  # rows of a Parquet file that are decoded together
LONGEST_LINE = 16 * MiB
TIMES_IN_MEMORY = 8  # a JSON file's size, when it is parsed: its bytes, its text, and the values made of it
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
    if "://" in source:
        faults.append(
            DataError(
                expected="data.train and data.test to name a file, a folder or a Hub id",
                found=f"the address {source}",
                fix="download it first, and name the file",
            )
        )
        return
    if is_file(path):
        yield from _read_file(path, faults, header=header)
        return
    if is_folder(path):
        yield from _read_folder(path, faults, split=split, header=header)
        return
    if _HUB_ID.match(source) and path.suffix not in DATA_SUFFIXES:
        yield from _read_hub(source, faults, split=split)
        return
    faults.append(
        DataError(
            expected="data.train and data.test to name a file, a folder or a Hub id",
            found=f"{_what_is_at(path)} at {source:.300}",
            fix="check the path; a recipe's is relative to its file, an override's to the working directory",
        )
    )


def _what_is_at(path: Path) -> str:
    try:
        require_ordinary(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return "nothing" if isinstance(error, FileNotFoundError) else f"no file that can be read ({reason})"
    return "nothing"


def text_lines(path: Path, *, setting: str) -> list[str]:
    """The lines of a text file that are not blank.

    Raises `DataError` naming the recipe's `setting`, or `Faults` for lines that are not UTF-8 or too long.
    """
    faults: list[IftPeftError] = []
    try:
        require_ordinary(path)
        lines = [line.strip() for _, line in _lines(path, faults) if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(
            expected=f"{setting} to be a readable file in UTF-8",
            found=f"{first_line(error)} ({path})",
            fix="check the path; a recipe's is relative to its file, an override's to the working directory",
        ) from None
    raise_all(faults)
    return lines


def folder_has_split(source: str, split: str) -> bool:
    """Whether `source` is a folder with files of its own for `split`."""
    path = Path(source)
    return is_folder(path) and bool(_split_files(path, split))


def _split_files(folder: Path, split: str) -> list[Path]:
    return [path for path in _data_files(folder) if re.match(rf"{re.escape(split)}(?![a-z])", path.stem, re.IGNORECASE)]


def _data_files(folder: Path) -> list[Path]:
    """Files by their names, links among them; what is none after all, as a link to nothing, is told when it is read."""
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in DATA_SUFFIXES[:-1])
    except OSError as error:
        raise DataError(
            expected=f"a folder that can be listed at {folder}", found=first_line(error), fix="check its rights"
        ) from None
    return [path for path in found if not is_folder(path)]


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
    """The records of one file. One that cannot be opened, or goes away while it is read, is a fault by its name."""
    try:
        require_ordinary(path)
        if not _writable_name(path):
            raise OSError("a name that is not in UTF-8, which no record of a run could hold")
        yield from _read_by_suffix(path, faults, header=header)
    except OSError as error:
        faults.append(
            DataError(
                expected=f"a file that can be read at {str(path)!r}",
                found=error.strerror or str(error),
                fix="check the file and its rights, or take it out of the folder",
            )
        )


def _writable_name(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_by_suffix(path: Path, faults: list[IftPeftError], *, header: bool) -> Iterator[Record]:
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
    """Line number and text; lines that are not UTF-8, or longer than LONGEST_LINE bytes, are named and left out."""
    number = 0
    with path.open("rb") as raw:
        while line := raw.readline(LONGEST_LINE + 1):
            number += 1
            if number == 1 and (fault := _other_encoding(path, line)):
                faults.append(fault)
                return
            if len(line) > LONGEST_LINE:
                faults.append(
                    DataError(
                        expected=f"lines of at most {LONGEST_LINE // MiB} MiB",
                        found=f"a longer one at {path}:{number}",
                        fix="put each row on a line of its own, or split it",
                    )
                )
                if line.count(b"\0") == len(line):  # a file of nothing, as a disk leaves it behind after a crash
                    return
                while line and not line.endswith(b"\n"):
                    line = raw.readline(LONGEST_LINE)
                continue
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                faults.append(_not_utf8(line[error.start :], error.start + 1, f"{path}:{number}"))


def _other_encoding(path: Path, start: bytes) -> DataError | None:
    """The fault of a file that begins as UTF-16 or UTF-32 does: all its lines would be faults of their own."""
    for name, mark in (
        ("UTF-32", codecs.BOM_UTF32_LE),
        ("UTF-16", codecs.BOM_UTF16_LE),
        ("UTF-16", codecs.BOM_UTF16_BE),
    ):
        if start.startswith(mark):
            return DataError(
                expected="UTF-8 text",
                found=f"{name} at {path}:1",
                fix=f"save the file as UTF-8 (iconv -f {name} -t UTF-8)",
            )
    return None


def _not_utf8(rest: bytes, at: int, where: str) -> DataError:
    """The fault of a line whose byte number `at`, the first of `rest`, begins no character."""
    return DataError(
        expected="UTF-8 text",
        found=f"byte {rest[0]:#04x} at {where}, byte {at} of the line",
        fix="save the file as UTF-8 (iconv -f GB18030 -t UTF-8 turns most Chinese files into it)",
    )


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large for a number")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each key of which stands in it once: of two values one would be lost."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key[:60]!a} twice in one object")
        found[key] = value
    return found


def _parse(text: str) -> Any:
    """A value of strict JSON. Raises `ValueError` or `RecursionError`."""
    return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_once)


def _told(error: ValueError | RecursionError, text: str) -> str:
    """What is wrong with a line or file of JSON, by what the user can see of it."""
    if isinstance(error, RecursionError):
        return "lists and objects nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        lone = "\r" in text.strip() and "\n" not in text.strip()
        return f"{error.msg} (lines end in CR alone: save it with LF)" if lone else str(error)
    return "a number with too many digits" if "set_int_max_str_digits" in str(error) else str(error)


def _read_jsonl(path: Path, faults: list[IftPeftError]) -> Iterator[Record]:
    for number, line in _lines(path, faults):
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
    if fault := _other_encoding(path, content[:4]):
        raise fault
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        number, at = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise _not_utf8(error.object[error.start : error.start + 1], at, f"{path}:{number}") from None


def _read_json(path: Path, faults: list[IftPeftError]) -> Iterator[Record]:
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


def _read_table(path: Path, faults: list[IftPeftError], *, delimiter: str, header: bool) -> Iterator[Record]:
    """CSV with quoting; tab-separated files are taken literally, as quotes in them are ordinary characters."""
    lines = (line for _, line in _lines(path, faults))
    csv.field_size_limit(LONGEST_LINE)  # a text may be as long as anywhere else
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
                DataError(
                    expected="valid CSV",
                    found=f"{_csv_fault(error)} at {path}:{start}",
                    fix="check the quotes and line ends there",
                )
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


def _csv_fault(error: csv.Error) -> str:
    told = str(error)
    if "new-line character" in told:
        return "a CR outside quotes: lines end in LF or CRLF"
    return f"a cell of more than {LONGEST_LINE // MiB} MiB" if "field larger" in told else told


def _read_parquet(path: Path, faults: list[IftPeftError]) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise pyarrow.ArrowInvalid(f"a column name more than once ({', '.join(names):.200})")
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
