"""Records of tables: CSV, tab-separated text, Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from ift_peft.data.fields import Record
from ift_peft.data.lines import LONGEST_LINE, lines_of
from ift_peft.errors import DataError, IftPeftError
from ift_peft.plain_files import MiB

PIECE = 1000  # rows of a Parquet file that are decoded together


def read_table(path: Path, faults: list[IftPeftError], *, delimiter: str, header: bool) -> Iterator[Record]:
    """CSV with quoting; tab-separated files are taken literally, as quotes in them are ordinary characters.

    Rows with other columns than the first line are appended to `faults` and left out; what is no CSV ends the file.
    """
    lines = (line for _, line in lines_of(path, faults))
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


def read_parquet(path: Path, faults: list[IftPeftError]) -> Iterator[Record]:
    """The file's rows, PIECE at a time; where it cannot be read on, that is appended to `faults`."""
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
