"""Which store a data folder belongs to: a random id, in the store and in `.store` of the folder.

A start deletes files that its store does not know. Over a folder of another store those would be all.
"""

from __future__ import annotations

import secrets

from sqlalchemy import insert, select

from ift_peft.durable import write_atomically
from ift_peft.errors import RunError
from ift_peft.serve.files.records import is_temporary
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Store
from ift_peft.serve.store.check import check_sqlite
from ift_peft.serve.store.tables import files, service

MARKER = ".store"


def check_place(settings: Settings) -> None:
    """Raises `RunError` for a folder that a start without its store would make another one in. Makes nothing."""
    if settings.store_url is not None or (settings.data_dir / "store.sqlite").exists():
        return
    if (settings.data_dir / MARKER).exists():
        raise _another(settings, "none, as store.sqlite is not there")
    _check_names(settings, frozenset())


def check_databases(settings: Settings) -> None:
    """Raises `RunError` where one of them is damaged: what it holds would be taken for all that was ever told."""
    if settings.store_url is None:
        store = settings.data_dir / "store.sqlite"
        if store.exists() and not store.stat().st_size and (settings.data_dir / MARKER).exists():
            raise _another(settings, "an empty store.sqlite")
        restore = "put a copy of ift backup in its place: ift restore, into another --data-dir"
        check_sqlite(store, fix=restore)
        again = "move it away; the jobs are queued again from the records"
        check_sqlite(settings.data_dir / "queue.sqlite", fix=again)


def tie(settings: Settings, store: Store) -> None:
    """Tie folder and store together where neither is tied yet. Raises `RunError` where they are not of each other.

    A folder without the mark, as an older or a restored one, is taken where the store knows all of its files.
    """
    marker = settings.data_dir / MARKER
    told = marker.read_text("utf-8").strip() if marker.exists() else None
    record = store.one(select(service))
    known = None if record is None else str(record["store_id"])
    if told is not None:
        if told != known:
            raise _another(settings, "another")
        return
    _check_names(settings, {record["id"] for record in store.every(select(files.c.id))})
    if known is None:
        known = secrets.token_hex(16)
        with store.begin() as connection:
            connection.execute(insert(service).values(store_id=known))
    write_atomically(marker, f"{known}\n")


def _check_names(settings: Settings, known: set[str] | frozenset[str]) -> None:
    found = sorted(path.name for path in settings.files.iterdir()) if settings.files.is_dir() else []
    unknown = [name for name in found if name not in known and not is_temporary(name)]
    if unknown:
        raise RunError(
            expected=f"files of the service in {settings.files}",
            found=f"{len(unknown)} that its store does not know, as {unknown[0]!r}",
            fix="give the same --store-url as before, or a --data-dir of its own",
        )


def _another(settings: Settings, found: str) -> RunError:
    return RunError(
        expected=f"the store of {settings.data_dir}",
        found=found,
        fix="give the same --store-url as before, or none where there was none; or another --data-dir",
    )
