"""Jobs without a server or a trainer: what is kept of their rows, and what a start finds."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select, update

from ift_peft.errors import RunError
from ift_peft.serve.errors import ApiError
from ift_peft.serve.files.records import delete_file, keep_file
from ift_peft.serve.jobs import creating
from ift_peft.serve.jobs.attempt import Attempt
from ift_peft.serve.jobs.body import CreateJob
from ift_peft.serve.jobs.folder import TRAINING_FILE
from ift_peft.serve.jobs.jobs import Jobs
from ift_peft.serve.jobs.progress import Progress
from ift_peft.serve.jobs.repeated import Caller
from ift_peft.serve.jobs.trainer import _device, lock_of
from ift_peft.serve.operations import backup
from ift_peft.serve.operations.backup import restore_backup, write_backup
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Record, Store
from ift_peft.serve.store.tables import jobs
from tests.serve.jobs import chats


class Line:
    """In the place of the queue: it keeps what is put into it."""

    def __init__(self) -> None:
        self.put_in: list[str] = []
        self.broken = False
        self.ended: set[tuple[str, int]] = set()

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def put(self, job: str, attempt: int, *, priority: int) -> bool:
        if self.broken:
            raise OSError("no space left")
        if (job, attempt) in self.ended:
            return False
        if job not in self.put_in:
            self.put_in.append(job)
        return True


class Made:
    """Jobs over an empty folder, and a file of rows."""

    def __init__(self, data_dir: Path) -> None:
        self.settings = Settings(data_dir=data_dir)
        for folder in (data_dir, self.settings.files, self.settings.runs, self.settings.jobs):
            folder.mkdir()
        self.store = Store(self.settings.database_url)
        self.jobs = Jobs(self.settings, self.store)
        self.line = Line()
        self.jobs.queue = self.line  # type: ignore[assignment]

    def upload(self) -> str:
        path = self.settings.files / ".upload-x"
        path.write_text("".join(json.dumps(row) + "\n" for row in chats(12)), "utf-8")
        kept = keep_file(
            self.settings, self.store, path, filename="rows.jsonl", purpose="fine-tune", sha256="x", rows=12
        )
        return str(kept["id"])

    def create(self, **options: Any) -> Record:
        options.setdefault("training_file", self.upload())
        return self.jobs.create(CreateJob.model_validate({"model": "tiny", **options}), Caller())

    def set(self, job: str, **values: Any) -> None:
        with self.store.begin() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job).values(**values))

    def of(self, job: str) -> Record:
        found = self.store.one(select(jobs).where(jobs.c.id == job))
        assert found is not None
        return found


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    made = Made(tmp_path / "data")
    yield made
    made.store.close()


@pytest.mark.parametrize("deleted", [False, True])
def test_a_backup_has_the_rows_of_a_job_that_ends_meanwhile(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: bool
) -> None:
    job = made.create()
    real = backup._content

    def content(*parts: Any) -> Iterator[str]:
        for at, name in enumerate(real(*parts)):
            yield name
            if at == 0:  # after the first file was copied, and before the job's folder is
                made.jobs.cancel(job["id"], Caller())
                shutil.rmtree(made.settings.jobs / job["id"])
                if deleted:
                    delete_file(made.settings, made.store, job["training_file"])

    monkeypatch.setattr(backup, "_content", content)
    notes = write_backup(made.settings.data_dir, tmp_path / "copy.tar").notes
    restore_backup(tmp_path / "copy.tar", tmp_path / "new")
    store = Store(Settings(data_dir=tmp_path / "new").database_url)
    found = store.one(select(jobs))
    assert found is not None and found["status"] == ("failed" if deleted else job["status"])
    rows = tmp_path / "new" / "jobs" / job["id"] / TRAINING_FILE
    assert rows.is_file() != deleted and [job["id"] in note for note in notes] == [True] * deleted
    store.close()


def test_a_folder_that_goes_away_does_not_end_a_backup(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = made.create()
    (made.settings.jobs / job["id"] / "cache").mkdir()
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if str(path).endswith("cache"):
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert write_backup(made.settings.data_dir, tmp_path / "copy.tar").notes == []


def test_rows_of_a_job_that_was_never_made_are_removed_at_a_start(made: Made) -> None:
    """As a kill between keeping the rows and writing the record leaves them."""
    job = made.create()["id"]
    unknown = made.settings.jobs / "ftjob-unknown"
    shutil.copytree(made.settings.jobs / job, unknown)
    made.jobs.start()
    made.jobs.stop()
    assert not unknown.exists() and (made.settings.jobs / job / TRAINING_FILE).is_file()


def test_a_file_that_is_deleted_while_a_job_is_made_was_deleted_before(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = made.upload()

    def delete_and_plan(**given: Any) -> Any:
        delete_file(made.settings, made.store, file)
        return real(**given)

    real = creating.plan
    monkeypatch.setattr(creating, "plan", delete_and_plan)
    with pytest.raises(ApiError, match="No such file") as refused:
        made.create(training_file=file)
    assert (refused.value.status, refused.value.param) == (400, "training_file")
    assert made.store.every(select(jobs.c.id)) == [] and list(made.settings.jobs.iterdir()) == []


def test_after_a_start_nothing_is_shown_as_at_work_and_what_was_goes_first(made: Made) -> None:
    waiting, validating, running, paused = (made.create()["id"] for _ in range(4))
    for job, status in ((waiting, "queued"), (validating, "validating_files"), (running, "running")):
        made.set(job, status=status, estimated_finish=int(time.time()) + 60)
    made.jobs.pause(paused, Caller())
    made.line.put_in.clear()
    made.jobs.start()
    made.jobs.stop()
    assert [made.of(job)["status"] for job in (waiting, validating, running, paused)] == ["queued"] * 3 + ["paused"]
    assert made.of(running)["estimated_finish"] is None
    assert made.line.put_in == [validating, running, waiting]


def test_a_job_that_the_queue_could_not_take_is_queued_later(made: Made) -> None:
    made.line.broken = True
    job = made.create()["id"]
    assert made.line.put_in == [] and made.of(job)["status"] == "validating_files"
    made.line.broken = False
    made.jobs.queue_again()
    assert made.line.put_in == [job]


class Trained(Attempt):
    """With a trainer that has just ended with `code`, after `meanwhile`."""

    code = 0

    def meanwhile(self) -> None: ...

    def _train(self, progress: Progress) -> int:
        self.meanwhile()
        run = self.settings.runs / self.job / "20300101-000000"
        checkpoint = run / "checkpoints" / "checkpoint-4"
        checkpoint.mkdir(parents=True)
        for name in ("adapter_model.safetensors", "optimizer.pt"):
            (checkpoint / name).write_bytes(b"x")
        (run / "test.jsonl").write_text("a row", "utf-8")
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "epoch": 1.0}\n', "utf-8")
        (run / "scores.json").write_text("{}", "utf-8")
        manifest = {"status": "succeeded", "steps": 1, "rows": {"train": {"tokens": 9, "variants": 1}}}
        (run / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        return self.code


@pytest.mark.parametrize("code", [0, 130])
def test_a_job_that_is_cancelled_and_its_file_deleted_while_its_trainer_ends_leaves_no_rows(
    made: Made, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    job = made.create()
    attempt = Trained(made.settings, made.store, threading.Event(), job["id"], 0)

    def meanwhile() -> None:
        made.jobs.cancel(job["id"], Caller())
        delete_file(made.settings, made.store, job["training_file"])

    monkeypatch.setattr(attempt, "meanwhile", meanwhile)
    monkeypatch.setattr(attempt, "code", code)
    attempt.run()
    (run,) = (made.settings.runs / job["id"]).iterdir()
    assert {path.name for path in run.rglob("*") if path.is_file()} == {
        *("adapter_model.safetensors", "metrics.jsonl", "scores.json", "manifest.json")
    }
    assert list(made.settings.jobs.iterdir()) == list(made.settings.files.iterdir()) == []
    assert made.of(job["id"])["status"] == "cancelled"


def test_a_gpu_has_one_lock_for_all_services_and_a_cpu_one_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, second = tmp_path / "first", tmp_path / "second"
    assert lock_of("cuda-1", first) == lock_of("cuda-1", second) != lock_of("cuda-2", first)
    folder = lock_of("cuda-1", first).parent
    assert (folder.parent, folder.stat().st_mode & 0o777) == (tmp_path, 0o700)
    assert lock_of("cpu", first) != lock_of("cpu", second)
    folder.rmdir()
    folder.symlink_to(tmp_path)  # as somebody else could have made it
    with pytest.raises(RunError, match="TMPDIR"):
        lock_of("cuda-1", first)
    for asked in ("auto", "cpu"):
        assert _device({"recipe": {"base": {"device": asked}}}) == "cpu" or torch.cuda.is_available()


def test_a_job_that_is_cancelled_while_it_waits_leaves_its_rows_at_once(made: Made) -> None:
    first, second = made.create()["id"], made.create()["id"]
    made.jobs.cancel(second, Caller())
    assert [path.name for path in made.settings.jobs.iterdir()] == [first]
