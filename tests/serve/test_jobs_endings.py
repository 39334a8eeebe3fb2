"""How a training ends, as the error of its job: by what the trainer told, and by its exit code alone."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select

from ift_peft.errors import DiskFull, Diverged, Faults, Hung, IftPeftError, NonFiniteLoss, OutOfMemory, TrainingError
from ift_peft.serve.jobs import trainer
from ift_peft.serve.jobs.attempt import Attempt
from ift_peft.serve.jobs.folder import JobFolder
from ift_peft.serve.jobs.progress import Progress
from ift_peft.serve.store import StoreUnavailable
from ift_peft.serve.store.tables import events
from tests.serve.test_jobs_inside import Made, Trained, made

__all__ = ["made"]
pytestmark = pytest.mark.slow
ENDINGS: list[tuple[type[IftPeftError], str]] = [
    (NonFiniteLoss, "non_finite_loss"),
    (Diverged, "diverged"),
    (DiskFull, "disk_full"),
    (OutOfMemory, "insufficient_memory"),
    (Hung, "hung"),
]


@pytest.fixture
def handed(made: Made) -> tuple[JobFolder, dict[str, Any]]:
    """The folder of a job, and the task of its trainer."""
    job = made.create()
    attempt = Attempt(made.settings, made.store, threading.Event(), job["id"], 0)
    return attempt.folder.handed(attempt._task(job)).taken()


def _main(folder: JobFolder, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """The trainer's process but for the work, which raises `error`."""

    def work(*given: Any) -> None:
        raise error

    monkeypatch.setattr(trainer, "_work", work)
    monkeypatch.setattr(trainer, "_die_with", lambda parent: None)
    monkeypatch.setattr(trainer.signal, "signal", lambda *given: None)
    monkeypatch.setattr(trainer.sys, "argv", [])
    return trainer.main(folder, 1)


@pytest.mark.parametrize(("kind", "code"), ENDINGS)
@pytest.mark.parametrize("together", [False, True])
def test_a_trainer_tells_how_training_ended(
    handed: tuple[JobFolder, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    kind: type[IftPeftError],
    code: str,
    together: bool,
) -> None:
    folder, _ = handed
    one = kind(expected="a loss", found=f"none in {folder.training}", fix="look")
    assert _main(folder, monkeypatch, Faults([one, one]) if together else one) == kind.exit_code
    error = folder.error()
    assert error is not None and error["code"] == code
    assert "training_file" in error["message"] and str(folder.path) not in error["message"]


def test_another_end_of_training_is_none_of_those(
    handed: tuple[JobFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = handed
    error = TrainingError(expected="a recipe", found="another", fix="change it")
    assert _main(folder, monkeypatch, error) == TrainingError.exit_code
    assert (folder.error() or {})["code"] == "training_failed"


def test_memory_that_torch_does_not_get_is_told_as_that(
    handed: tuple[JobFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = handed
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 55)
    assert _main(folder, monkeypatch, raised.value) == 1
    assert (folder.error() or {})["code"] == "insufficient_memory"


def test_a_full_disk_is_told_by_the_exit_code_alone(
    handed: tuple[JobFolder, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = handed

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ift_peft.serve.jobs.folder.write_atomically", full)
    error = OSError(errno.ENOSPC, "No space left on device")
    assert _main(folder, monkeypatch, error) == DiskFull.exit_code and folder.error() is None


@pytest.mark.parametrize(("kind", "code"), ENDINGS)
def test_a_trainer_that_ended_without_a_word_fails_by_its_exit_code(
    made: Made, monkeypatch: pytest.MonkeyPatch, kind: type[IftPeftError], code: str
) -> None:
    """As where a watchdog ends it by `os._exit`."""
    job = made.create()["id"]
    attempt = Trained(made.settings, made.store, threading.Event(), job, 0)
    monkeypatch.setattr(attempt, "code", kind.exit_code)
    attempt.run()
    found = made.of(job)
    assert found["status"] == "failed" and found["error"]["code"] == code and found["finished_at"] is not None
    assert not (made.settings.jobs / job / "task.json").exists()


def test_what_a_full_disk_keeps_the_service_from_writing_fails_the_job(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: JobFolder, task: dict[str, Any]) -> JobFolder:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(JobFolder, "handed", full)
    job = made.create()["id"]
    Attempt(made.settings, made.store, threading.Event(), job, 0).run()
    assert made.of(job)["error"]["code"] == "disk_full"


def test_events_that_a_locked_store_did_not_take_are_told_later_and_once(made: Made, tmp_path: Path) -> None:
    record = made.create()
    folder = Attempt(made.settings, made.store, threading.Event(), record["id"], 0).folder.handed({})
    progress = Progress(made.settings, made.store, record, folder)
    for kind in ("checked", "begun"):
        folder.report(kind)
    folder.report("stage", text="training", total=2)
    run = made.settings.runs / record["id"] / "20300101-000000"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text("{}", "utf-8")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "epoch": 1.0}) + "\n", "utf-8")
    with sqlite3.connect(made.settings.data_dir / "store.sqlite", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable) as raised:
            progress.update()
        assert (raised.value.status, raised.value.headers["Retry-After"]) == (503, "5")
        other.execute("ROLLBACK")
    other.close()
    progress.update()
    progress.update()
    told = [one["message"] for one in made.store.every(select(events).where(events.c.job == record["id"]))]
    assert made.of(record["id"])["status"] == "running"
    for message in ("Files validated", "Fine-tuning job started", "Step 1/2"):
        assert sum(one.startswith(message) for one in told) == 1, told


def test_an_attempt_that_the_queue_holds_for_ended_is_made_again(made: Made) -> None:
    job = made.create()["id"]
    made.line.ended = {(job, 0)}
    made.jobs.queue_again()
    assert made.of(job)["attempt"] == 1 and made.line.put_in[-1] == job
    made.set(job, status="succeeded")
    made.line.ended = {(job, 1)}
    made.jobs.queue_again()
    assert made.of(job)["attempt"] == 1
