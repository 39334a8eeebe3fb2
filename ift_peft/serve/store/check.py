"""Whether a database that is there can be relied on, before it is written to."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError

from ift_peft.errors import DiskFull, RunError
from ift_peft.serve.store import StoreUnavailable

READ_ONLY = 8  # of SQLite: a transaction that a crash broke off has to be rolled back first
DAMAGED = (11, 26)  # of SQLite: a page that is none, a file that is no database


def check_sqlite(path: Path, *, fix: str) -> None:
    """Raises `RunError` for a file that is no SQLite database, or a damaged one, which stays as it is; `fix` is for
    those. One that cannot be looked at, as another process holds it, is an error of its own.

    An empty one is what a kill leaves of a first start.
    """
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    found = _checked(path, "ro")
    if found != "ok":
        raise RunError(expected=f"a whole SQLite database as {path}", found=found, fix=fix)


@contextmanager
def opening(url: str) -> Iterator[None]:
    """Raises `RunError`, or `DiskFull`, where the database at `url` keeps the block from its work: nobody is answered
    yet who could be told to come back."""
    made = make_url(url)
    name = str(made.database) if made.get_backend_name() == "sqlite" else "the database of --store-url"
    try:
        yield
    except (StoreUnavailable, OperationalError) as error:
        cause = error.__cause__ if isinstance(error, StoreUnavailable) else error
        found = str(getattr(cause, "orig", None) or cause)
        if isinstance(error, StoreUnavailable) and error.status == 507:
            raise DiskFull(expected=f"room for {name}", found=found, fix="make room") from None
        raise _cannot_open(name, found) from None


def _cannot_open(name: str, found: str) -> RunError:
    """Of a database that says nothing, so that nothing can be said of what it holds."""
    fix = "end what else has it open, or give this user the right to it"
    return RunError(expected=f"{name} to open", found=found, fix=fix)


def _checked(path: Path, mode: str) -> str:
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=30)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if mode == "ro" and code == READ_ONLY:
            return _checked(path, "rw")
        if code not in DAMAGED:
            raise _cannot_open(str(path), str(error)) from None
        found = str(error)
    return str(found).splitlines()[-1]
