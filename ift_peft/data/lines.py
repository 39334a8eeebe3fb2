"""The numbered lines of text files in UTF-8; those of other encodings, or too long, are faults by file and line."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from ift_peft.errors import DataError, IftPeftError, first_line, raise_all
from ift_peft.plain_files import MiB, require_ordinary

LONGEST_LINE = 16 * MiB


def text_lines(path: Path, *, setting: str) -> list[str]:
    """The lines of a text file that are not blank.

    Raises `DataError` naming the recipe's `setting`, or `Faults` for lines that are not UTF-8 or too long.
    """
    faults: list[IftPeftError] = []
    try:
        require_ordinary(path)
        lines = [line.strip() for _, line in lines_of(path, faults) if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(
            expected=f"{setting} to be a readable file in UTF-8",
            found=f"{first_line(error)} ({path})",
            fix="check the path; a recipe's is relative to its file, an override's to the working directory",
        ) from None
    raise_all(faults)
    return lines


def lines_of(path: Path, faults: list[IftPeftError]) -> Iterator[tuple[int, str]]:
    """Line number and text; lines that are not UTF-8, or longer than LONGEST_LINE bytes, are named and left out."""
    number = 0
    with path.open("rb") as raw:
        while line := raw.readline(LONGEST_LINE + 1):
            number += 1
            if number == 1 and (fault := other_encoding(path, line)):
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
                faults.append(not_utf8(line[error.start :], error.start + 1, f"{path}:{number}"))


def other_encoding(path: Path, start: bytes) -> DataError | None:
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


def not_utf8(rest: bytes, at: int, where: str) -> DataError:
    """The fault of a line whose byte number `at`, the first of `rest`, begins no character."""
    return DataError(
        expected="UTF-8 text",
        found=f"byte {rest[0]:#04x} at {where}, byte {at} of the line",
        fix="save the file as UTF-8 (iconv -f GB18030 -t UTF-8 turns most Chinese files into it)",
    )
