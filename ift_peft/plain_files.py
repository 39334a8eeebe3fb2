"""Files that a user names, read whole: ordinary ones, of a size that somebody wrote or a tool made for this."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

MiB = 1 << 20
NOT_TEXT = re.compile("[\0\ud800-\udfff]")
"""What no text holds: the mark of a binary file, and halves of surrogate pairs, which UTF-8 cannot write."""


def require_ordinary(path: Path) -> None:
    """Raises `OSError` for what is no ordinary file: a device, a pipe or a socket may have no end, or no beginning."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder where a file is expected", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a device or a pipe where a file is expected", str(path))


def read_text(path: Path, *, most: int = 64 * MiB) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises `OSError` for one that cannot be read, is no ordinary file or is larger than `most` bytes, and
    `UnicodeDecodeError`.
    """
    try:
        require_ordinary(path)
        content = bytearray()
        with path.open("rb") as file:  # in pieces: as much memory as is asked for is taken, however short the file is
            while len(content) <= most and (piece := file.read(MiB)):
                content += piece
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than {most // MiB} MiB", str(path))
    return content.decode("utf-8-sig")


def home_of(name: str) -> Path:
    """The path `name`, with ~ for a home folder; as it is where there is no such home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def exists(path: Path) -> bool:
    """Whether there is anything, False too for what can be no name: too long, or with a NUL."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether there is a file, False too for what can be no name of one."""
    return exists(path) and path.is_file()


def is_folder(path: Path) -> bool:
    """Whether there is a folder, False too for what can be no name of one."""
    return exists(path) and path.is_dir()
