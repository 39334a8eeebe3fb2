"""Files that are kept: a record in the store, and the content at `files/<id>`.

The content is written first and the record last, so that a file with a record is whole. Deleting goes the other way
round, and ends with the rows that runs hold copies of; what a crash leaves undone is done at the next start.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, insert, or_, select

from ift_peft.durable import sync_folder
from ift_peft.errors import RunError
from ift_peft.serve.errors import ApiError, not_found
from ift_peft.serve.files.forget import forget_rows
from ift_peft.serve.ids import new_id
from ift_peft.serve.objects import FINAL, File
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Record, Store
from ift_peft.serve.store.tables import files, jobs

TEMPORARY = ".upload-"
_NAME = r"file-[A-Za-z0-9]{24}"
_TEMPORARY = re.compile(rf"{re.escape(TEMPORARY)}.*|\.{_NAME}\..*")  # of uploads, and of result files


def is_temporary(name: str) -> bool:
    """Whether a name in the folder of files is of something that was never finished."""
    return _TEMPORARY.fullmatch(name) is not None


def alive(now: float | None = None) -> Any:
    """The condition of a file that has not expired."""
    return or_(files.c.expires_at.is_(None), files.c.expires_at > int(time.time() if now is None else now))


def find_file(store: Store, file_id: str, *, param: str = "file_id") -> Record:
    """The record of a file. Raises `ApiError` (404) where there is none, or it has expired."""
    record = store.one(select(files).where(files.c.id == file_id, alive()))
    if record is None:
        raise not_found("file", file_id, param=param)
    return record


def as_file(record: Record) -> File:
    """A record as the API answers with it."""
    return File(**{name: record[name] for name in ("id", "bytes", "created_at", "expires_at", "filename", "purpose")})


def keep_file(
    settings: Settings,
    store: Store,
    temporary: Path,
    *,
    filename: str,
    purpose: str,
    sha256: str,
    rows: int | None = None,
    seconds: int | None = None,
) -> Record:
    """Make the synced file `temporary`, which lies in the folder of files, a file of its own id; it may expire."""
    file_id, now = new_id("file"), int(time.time())
    path = settings.files / file_id
    size = temporary.stat().st_size
    os.rename(temporary, path)
    try:
        sync_folder(settings.files)
        values = {"id": file_id, "created_at": now, "filename": filename, "purpose": purpose, "bytes": size}
        expires = None if seconds is None else now + seconds
        with store.begin() as connection:
            connection.execute(insert(files).values(**values, rows=rows, sha256=sha256, expires_at=expires))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return find_file(store, file_id)


def delete_file(settings: Settings, store: Store, file_id: str) -> None:
    """Delete record, content, and the rows that runs copied from it.

    Raises `ApiError`: 404 where there is none, 400 where a job that is not final uses it.
    """
    find_file(store, file_id)
    with store.begin() as connection:
        connection.execute(select(files.c.id).where(files.c.id == file_id).with_for_update())  # a job may be being made
        using = _using(connection, file_id)
        if using is not None:
            raise ApiError(
                400,
                f"The file {file_id!r} is used by the job {using!r}, which has not ended. Cancel it, or wait for it.",
                code="file_in_use",
                param="file_id",
            )
        connection.execute(delete(files).where(files.c.id == file_id))
    _erase(settings, store, file_id)


def sweep(settings: Settings, store: Store, *, forget: Callable[[str], None]) -> int:
    """Delete the files that have expired, but those that a job still uses; their number. `forget` is told each."""
    expired = [record["id"] for record in store.every(select(files.c.id).where(~alive()))]
    done = 0
    for file_id in expired:
        with store.begin() as connection:
            if _using(connection, file_id) is not None:
                continue
            connection.execute(delete(files).where(files.c.id == file_id))
        _erase(settings, store, file_id)
        forget(file_id)  # after it: no look can begin any more
        done += 1
    return done


def clean(settings: Settings, store: Store) -> None:
    """What a crash may have left, before anything is served: uploads without an end, content without a record, rows of
    deleted files. Raises `RunError`, and deletes nothing, where something lies there that the service never makes."""
    known = {record["id"] for record in store.every(select(files.c.id))}
    left = sorted(path for path in settings.files.iterdir() if path.name not in known)
    for path in left:
        if path.is_dir() or not (is_temporary(path.name) or re.fullmatch(_NAME, path.name)):
            raise RunError(
                expected=f"files of the service alone in {settings.files}",
                found=repr(path.name),
                fix="move it elsewhere, or give another --data-dir",
            )
    for path in left:
        path.unlink()
    used = select(jobs.c.training_file, jobs.c.validation_file).where(jobs.c.status.in_(FINAL))
    gone = {name for record in store.every(used) for name in record.values() if name is not None} - known
    for file_id in gone:
        _forget(settings, store, file_id)


def forget_deleted(settings: Settings, store: Store, job: str) -> None:
    """Remove from what the job has left the rows of its files that are deleted: its trainer may have written some
    after the deletion."""
    uses = store.one(select(jobs.c.status, jobs.c.training_file, jobs.c.validation_file).where(jobs.c.id == job))
    if uses is None or uses["status"] not in FINAL:
        return
    used = {uses["training_file"], uses["validation_file"]} - {None}
    known = {record["id"] for record in store.every(select(files.c.id).where(files.c.id.in_(used)))}
    for file_id in used - known:
        _forget(settings, store, file_id)


def _using(connection: Connection, file_id: str) -> str | None:
    """A job that has not ended and uses the file."""
    uses = or_(jobs.c.training_file == file_id, jobs.c.validation_file == file_id)
    found = connection.execute(select(jobs.c.id).where(uses, jobs.c.status.not_in(FINAL)).limit(1)).scalar()
    return None if found is None else str(found)


def _erase(settings: Settings, store: Store, file_id: str) -> None:
    (settings.files / file_id).unlink(missing_ok=True)
    sync_folder(settings.files)
    _forget(settings, store, file_id)
    store.overwrite_deleted()


def _forget(settings: Settings, store: Store, file_id: str) -> None:
    uses = or_(jobs.c.training_file == file_id, jobs.c.validation_file == file_id)
    for job in store.every(select(jobs.c.id, jobs.c.run).where(uses)):
        runs = {path.parent for path in (settings.runs / job["id"]).glob("*/manifest.json")}
        runs |= {settings.data_dir / job["run"]} if job["run"] else set()
        shutil.rmtree(settings.jobs / job["id"], ignore_errors=True)  # its log may quote them
        for run in sorted({path.resolve() for path in runs if path.is_dir()}):
            forget_rows(run)
