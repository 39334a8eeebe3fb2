"""Files and links that are whole or not there, whatever ends the process or the power; and disks that are full."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ift_peft.errors import FULL, DiskFull, first_line, is_full

_OF_WRITING = ("PytorchStreamWriter", "inline_container", "iostream error")  # what torch says where it cannot write
_PROBED_BYTES = 1024 * 1024


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, sees the whole old file or the whole new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        sync_folder(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sync_file(path: Path) -> None:
    """Have what was written to `path` reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Have the names in `path` reach the disk: after a rename, the new one would be lost by a power cut."""
    with suppress(PermissionError):  # a folder that may be written to but not read
        sync_file(path)


def sync_tree(path: Path) -> None:
    """`path`, and all files and folders in it."""
    for found in (*path.rglob("*"), path):
        sync_file(found)


def disk_full(error: BaseException, folder: Path) -> DiskFull | None:
    """What a library's error about a full disk is for us; None for any other error.

    torch does not say why it could not write: it is tried whether `folder` takes any more.
    """
    told = f"{type(error).__name__}: {error}"
    full = is_full(error) or any(os.strerror(number) in told for number in FULL)  # safetensors and tokenizers: in words
    if not full and isinstance(error, RuntimeError) and any(words in told for words in _OF_WRITING):
        full = not _takes_more(folder)
    if not full:
        return None
    return DiskFull(
        expected=f"room on the disk of {folder}",
        found=first_line(error),
        fix="make room; what was written before is whole, and an unfinished run goes on with: ift train --resume RUN",
    )


def _takes_more(folder: Path) -> bool:
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        with probe.open("wb") as file:
            file.write(os.urandom(_PROBED_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def point(link: Path, name: str) -> None:
    """Make `link` a link to the folder `name` beside it, in one rename."""
    temporary = link.parent / f".{link.name}-{secrets.token_hex(4)}"
    temporary.symlink_to(name, target_is_directory=True)
    try:
        os.replace(temporary, link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def scratch_beside(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output`, gone at the end whatever happens."""
    folder = output.parent / f".{output.name}.{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
