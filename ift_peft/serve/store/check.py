"""Whether a database that is there can be relied on, before it is written to."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from ift_peft.errors import RunError

READ_ONLY = 8  # of SQLite: a transaction that a crash broke off has to be rolled back first


def check_sqlite(path: Path, *, fix: str) -> None:
    """Raises `RunError` for a file that is no SQLite database, or a damaged one, which stays as it is.

    An empty one is what a kill leaves of a first start.
    """
    if not path.exists() or not path.stat().st_size:
        return
    found = _checked(path, "ro")
    if found != "ok":
        raise RunError(expected=f"a whole SQLite database as {path}", found=found, fix=fix)


def _checked(path: Path, mode: str) -> str:
    connection = sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=30)
    try:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        if mode == "ro" and getattr(error, "sqlite_errorcode", 0) & 0xFF == READ_ONLY:
            return _checked(path, "rw")
        found = str(error)
    finally:
        connection.close()
    return str(found).splitlines()[-1]
