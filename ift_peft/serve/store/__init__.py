"""The store: what the service was told and must not forget. SQLite, or any database SQLAlchemy reaches by URL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, Select, Table, create_engine, event, select
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection

from ift_peft.serve.errors import ApiError, no_room
from ift_peft.serve.store.tables import metadata

Record = RowMapping
SQLITE_FULL = 13
SQLITE_FOR_NOW = (5, 6, 8, 10, 14)  # busy, locked, read-only, an I/O error, not to be opened: of the place, not of us
WAIT_MS = 30_000
RETRY_AFTER = "5"


class StoreUnavailable(ApiError):
    """The database cannot do what it was asked at the moment: locked by another process, on a full disk, or away.

    What was to be written is not there in part. Told to clients as 503 with Retry-After, or as 507.
    """


class Store:
    """A database with the tables of `tables`. What a transaction wrote is on the disk when it returns."""

    def __init__(self, url: str) -> None:
        """Raises `StoreUnavailable` where the tables cannot be looked for."""
        self.engine: Engine = create_engine(url, hide_parameters=True)  # errors are logged, and say no content
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin)
        self._reading = self.engine.execution_options(reading=True)
        with _told():
            metadata.create_all(self.engine)

    @contextmanager
    def begin(self, *, wait_ms: int = WAIT_MS) -> Iterator[Connection]:
        """A transaction that may write, committed at the end of the block and rolled back where that raises.

        It waits up to `wait_ms` for another writer; that holds for SQLite, other databases have limits of their own.
        """
        with _told(), self.engine.execution_options(wait_ms=wait_ms).begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads, and waits for no writer."""
        with _told(), self._reading.begin() as connection:
            yield connection

    def one(self, query: Select[Any]) -> Record | None:
        """The first record, if any."""
        with self.read() as connection:
            return connection.execute(query).mappings().first()

    def every(self, query: Select[Any]) -> list[Record]:
        """All records."""
        with self.read() as connection:
            return list(connection.execute(query).mappings().all())

    def page(
        self, table: Table, *conditions: Any, after: str | None, limit: int, ascending: bool = False
    ) -> tuple[list[Record], bool]:
        """Up to `limit` records that fulfil `conditions`, the newest first, and whether there are more.

        They begin behind the one with the id `after`. Raises `ApiError` (400) where that is not among them.
        """
        number = table.c.number
        query = select(table).where(*conditions).order_by(number.asc() if ascending else number.desc())
        with self.read() as connection:
            if after is not None:
                found = connection.execute(select(number).where(table.c.id == after, *conditions)).scalar()
                if found is None:
                    raise ApiError(
                        400, f"No object with the id {after!r} in this list.", code="invalid_value", param="after"
                    )
                query = query.where(number > found if ascending else number < found)
            records = list(connection.execute(query.limit(limit + 1)).mappings().all())
        return records[:limit], len(records) > limit

    def overwrite_deleted(self) -> None:
        """Leave nothing of deleted records on the disk: SQLite's log still holds them. Other databases do as set up."""
        if self.engine.dialect.name == "sqlite":
            with _told():
                connection = self.engine.raw_connection()
            try:
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
            finally:
                connection.close()

    def close(self) -> None:
        self.engine.dispose()


@contextmanager
def _told() -> Iterator[None]:
    """What another process, or the disk, keeps the database from, as `StoreUnavailable`."""
    try:
        yield
    except NoConnection as error:
        raise _busy() from error
    except DBAPIError as error:
        code = getattr(error.orig, "sqlite_errorcode", None)
        if code is not None and code & 0xFF == SQLITE_FULL:
            room = no_room()
            raise StoreUnavailable(room.status, room.message, code=room.code) from error
        for_now = code & 0xFF in SQLITE_FOR_NOW if code is not None else isinstance(error, OperationalError)
        if not for_now:
            raise
        raise _busy() from error


def _busy() -> StoreUnavailable:
    return StoreUnavailable(
        503,
        "The service cannot reach its records at the moment.",
        code="store_unavailable",
        headers={"Retry-After": RETRY_AFTER},
    )


def _prepare_sqlite(connection: Any, record: Any) -> None:
    """Durable once acknowledged, patient with other writers, and what is deleted is overwritten."""
    connection.isolation_level = None  # transactions are begun below, not by the driver
    for pragma in (
        f"busy_timeout={WAIT_MS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "secure_delete=ON",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin(connection: Connection) -> None:
    """One that first reads and then writes would fail where another has written in between: it begins as a writer."""
    options = connection.get_execution_options()
    reading = options.get("reading", False)
    connection.exec_driver_sql(f"PRAGMA busy_timeout={options.get('wait_ms', WAIT_MS)}")
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
