"""A copy of a service's folder in one tar file, made while it runs; and a folder made of that again.

The databases are copied first, each as of one moment, and then the content that their records name; the queue before
the records, as a job that is queued and has ended is passed over, and one that is not queued is queued again. What was
deleted in between has its record taken out of the copy: every record there has its content. A job that ends in between
takes the rows of its folder along; they are copied from the files that they came from. `manifest.json` comes last, with
the sha256 of all. Of a run that is being trained the checkpoints are copied that have
got their name, which those get that are whole; it goes on from the newest whose copy verifies.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ift_peft.durable import sync_folder
from ift_peft.errors import RunError
from ift_peft.serve.jobs.folder import TRAINING_FILE, VALIDATION_FILE
from ift_peft.serve.objects import FINAL

STORE, QUEUE, MANIFEST = "store.sqlite", "queue.sqlite", "manifest.json"
FORMAT = 1
_PIECE = 1 << 20
_IN_MEMORY = 8 << 20  # of a file that is copied; a larger one lies beside the target meanwhile


@dataclass
class Backup:
    """What a backup holds: number and bytes of its files, and what was left out and why."""

    files: int = 0
    bytes: int = 0
    notes: list[str] = field(default_factory=list)


def write_backup(data_dir: Path, target: Path) -> Backup:
    """Write the service in `data_dir` to `target`. Raises `RunError` where there is none, or `target` exists."""
    if not (data_dir / STORE).is_file():
        raise RunError(
            expected=f"{STORE} in {data_dir}",
            found="none",
            fix="give the --data-dir of a service; records at a --store-url are backed up by that database's own tools",
        )
    if target.exists():
        raise RunError(expected=f"a new file as {target}", found="one that exists", fix="give another name as --to")
    folder = target.resolve().parent
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file, tempfile.TemporaryDirectory(dir=folder, prefix=".backup-") as scratch:
            made = _write(data_dir, file, Path(scratch))
            file.flush()
            os.fsync(file.fileno())
        os.rename(name, target)
        sync_folder(folder)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return made


def _write(data_dir: Path, file: IO[bytes], scratch: Path) -> Backup:
    made = Backup()
    hashes: dict[str, dict[str, Any]] = {}
    copies = {name: _copied(data_dir / name, scratch / name) for name in (QUEUE, STORE) if (data_dir / name).is_file()}
    store = sqlite3.connect(copies[STORE])
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in _content(store, data_dir, made):
            _add(tar, data_dir / name, name, hashes, scratch=scratch)
        for copied, file_id in _rows_of_jobs(store):
            if copied not in hashes:
                _add(tar, data_dir / "files" / file_id, copied, hashes, scratch=scratch)
        _take_out_lost(store, hashes, made)
        store.close()
        for name, path in copies.items():
            _add(tar, path, name, hashes, scratch=scratch)
        manifest = {"format": FORMAT, "made": int(time.time()), "files": hashes}
        content = json.dumps(manifest, ensure_ascii=False, indent=1).encode()
        info = tarfile.TarInfo(MANIFEST)
        info.size, info.mode = len(content), 0o600
        tar.addfile(info, io.BytesIO(content))
    made.files, made.bytes = len(hashes), sum(one["bytes"] for one in hashes.values())
    return made


def _copied(source: Path, target: Path) -> Path:
    """SQLite's own online copy: of one moment, whatever is written meanwhile."""
    origin, copy = sqlite3.connect(source, timeout=60), sqlite3.connect(target)
    try:
        origin.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")
    finally:
        origin.close()
        copy.close()
    return target


def _content(store: sqlite3.Connection, data_dir: Path, made: Backup) -> Iterator[str]:
    """Paths below the folder of what the records name: files, runs, and what trainers were handed."""
    for (file_id,) in store.execute("SELECT id FROM files ORDER BY number"):
        yield f"files/{file_id}"
    jobs = store.execute("SELECT id, status, run FROM jobs ORDER BY number").fetchall()
    at_work = {data_dir / run for _, status, run in jobs if run and status not in FINAL}
    runs = {run for (run,) in store.execute("SELECT run FROM models UNION SELECT run FROM jobs") if run}
    for folder in (*sorted(runs), *(f"jobs/{job}" for job, _, _ in jobs)):
        top = data_dir / folder
        for place, folders, names in os.walk(top):  # which passes over what goes away meanwhile
            if top in at_work and Path(place).name == "checkpoints":
                for part in [one for one in folders if not one.startswith("checkpoint-")]:  # named when it is whole
                    folders.remove(part)
                    made.notes.append(f"without {part} of {folder}, which was being written")
            folders.sort()
            for path in (Path(place, name) for name in sorted(names)):
                if path.is_file() and not path.is_symlink() and path.name != ".lock":
                    yield path.relative_to(data_dir).as_posix()


def _rows_of_jobs(store: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """What each job that has not ended needs in its folder, by path, and the file that it came from."""
    query = "SELECT id, status, training_file, validation_file FROM jobs ORDER BY number"
    for job, status, *used in store.execute(query).fetchall():
        for name, file_id in zip((TRAINING_FILE, VALIDATION_FILE), used, strict=True):
            if file_id is not None and status not in FINAL:
                yield f"jobs/{job}/{name}", file_id


def _add(tar: tarfile.TarFile, path: Path, name: str, hashes: dict[str, dict[str, Any]], *, scratch: Path) -> None:
    """One file as it is now; none where it is gone. One that grows or shrinks meanwhile is taken as far as it was read:
    its size is known when it has been."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file, tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, dir=str(scratch)) as copy:
        found = os.fstat(file.fileno())
        digest, left = hashlib.sha256(), found.st_size
        while piece := file.read(min(left, _PIECE)):
            digest.update(piece)
            copy.write(piece)
            left -= len(piece)
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = copy.tell(), 0o600, int(found.st_mtime)
        copy.seek(0)
        tar.addfile(info, copy)
        hashes[name] = {"sha256": digest.hexdigest(), "bytes": info.size}


def _take_out_lost(store: sqlite3.Connection, hashes: dict[str, Any], made: Backup) -> None:
    for (file_id,) in store.execute("SELECT id FROM files").fetchall():
        if f"files/{file_id}" not in hashes:
            store.execute("DELETE FROM files WHERE id = ?", (file_id,))
            made.notes.append(f"without {file_id}, whose content was deleted meanwhile")
    for name, adapter in store.execute("SELECT name, adapter FROM models").fetchall():
        if f"{adapter}/adapter_model.safetensors" not in hashes:
            store.execute("DELETE FROM models WHERE name = ?", (name,))
            made.notes.append(f"without {name}, whose adapter was deleted meanwhile")
    lost = {PurePosixPath(copied).parts[1] for copied, _ in _rows_of_jobs(store) if copied not in hashes}
    for job in sorted(lost):
        error = {"code": "rows_lost", "message": "it ended during a backup, and its rows were deleted", "param": None}
        failed = "UPDATE jobs SET status = 'failed', finished_at = ?, error = ? WHERE id = ?"
        store.execute(failed, (int(time.time()), json.dumps(error), job))
        made.notes.append(f"{job} as failed: it ended meanwhile, and its rows were deleted")
    store.commit()


def restore_backup(archive: Path, data_dir: Path) -> Backup:
    """Make `data_dir` from a backup, whole or not at all.

    Raises `RunError` where the folder holds something, or where the file is no backup, holds a path that leads
    elsewhere, misses a file, has one too many, or one with another content.
    """
    if data_dir.exists() and (not data_dir.is_dir() or any(data_dir.iterdir())):
        raise RunError(
            expected=f"an empty folder, or none, as {data_dir}", found="one that holds files", fix="give another"
        )
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=data_dir.parent, prefix=f".{data_dir.name}."))
    try:
        made = _extract(archive, scratch)
        if data_dir.exists():
            data_dir.rmdir()
        os.rename(scratch, data_dir)
        sync_folder(data_dir.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return made


def _extract(archive: Path, folder: Path) -> Backup:
    hashes: dict[str, dict[str, Any]] = {}
    manifest: dict[str, Any] | None = None
    try:
        with tarfile.open(archive, mode="r:") as tar:
            for member in tar:
                found = _read(tar, member, folder)
                if member.name == MANIFEST:
                    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
                elif member.name in hashes:
                    raise _broken(archive, f"{member.name} twice")
                else:
                    hashes[member.name] = found
    except (tarfile.TarError, ValueError, EOFError, FileExistsError, NotADirectoryError) as error:
        raise _broken(archive, f"{type(error).__name__}: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _broken(archive, "no manifest of a form that is known")
    told = manifest.get("files")
    told = told if isinstance(told, dict) else {}
    if hashes != told or STORE not in hashes:
        wrong = {name for name in hashes.keys() | told if hashes.get(name) != told.get(name)}
        raise _broken(archive, f"other content than its manifest says: {', '.join(sorted(wrong)[:5]) or STORE}")
    (folder / MANIFEST).unlink()
    for name in (STORE, QUEUE):
        if name in hashes:
            _check_database(folder / name, archive)
    return Backup(len(hashes), sum(one["bytes"] for one in hashes.values()))


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> dict[str, Any]:
    parts = PurePosixPath(member.name).parts
    if not member.isfile() or member.issparse() or not parts or parts[0] == "/" or ".." in parts:
        raise tarfile.TarError(f"{member.name!r} is no plain file below the folder")
    member = tarfile.data_filter(member, str(folder))
    source = tar.extractfile(member)
    assert source is not None
    path = folder.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    digest, size = hashlib.sha256(), 0
    with source, path.open("xb") as target:
        while piece := source.read(_PIECE):
            digest.update(piece)
            size += len(piece)
            target.write(piece)
        target.flush()
        os.fsync(target.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}


def _check_database(path: Path, archive: Path) -> None:
    connection = sqlite3.connect(path)
    try:
        (found,) = connection.execute("PRAGMA integrity_check").fetchone()
    except sqlite3.DatabaseError as error:
        found = str(error)
    finally:
        connection.close()
    if found != "ok":
        raise _broken(archive, f"{path.name}: {found}")


def _broken(archive: Path, found: str) -> RunError:
    return RunError(expected=f"a whole file of ift backup as {archive}", found=found, fix="take another backup")
