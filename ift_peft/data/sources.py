"""Where rows come from: a file, a folder, or a Hub id, each read into records that know the line they stood on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ift_peft.data.fields import Record
from ift_peft.data.json_files import read_json, read_jsonl
from ift_peft.data.tables import read_parquet, read_table
from ift_peft.errors import DataError, IftPeftError, first_line
from ift_peft.plain_files import is_file, is_folder, require_ordinary
from ift_peft.sections import DATA_SUFFIXES

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


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
        yield from read_jsonl(path, faults)
    elif suffix == ".json":
        yield from read_json(path, faults)
    elif suffix in (".csv", ".tsv", ".txt"):
        yield from read_table(path, faults, delimiter="," if suffix == ".csv" else "\t", header=header)
    elif suffix == ".parquet":
        yield from read_parquet(path, faults)
    else:
        faults.append(
            DataError(
                expected=f"a file ending in {', '.join(DATA_SUFFIXES)}",
                found=str(path),
                fix="convert it, or rename it to what it is",
            )
        )


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
