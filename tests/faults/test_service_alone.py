"""What goes wrong around a service that has a machine's disk, records and device to itself."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.conftest import Observed
from tests.faults.serving import (
    RATE,
    Watched,
    _clients_are_closed,
    _no_network,
    at_work,
    ended,
    eventually,
    held,
    refusal,
)
from tests.faults.trained import fill, mounted
from tests.serve import jobs
from tests.serve.conftest import Server
from tests.serve.walk import rows

__all__ = ["_clients_are_closed", "_no_network"]
pytestmark = pytest.mark.slow


@pytest.mark.fault(
    "service",
    "no room under the data folder: for an upload, a job, a training",
    expected="507; the job failed with disk_full; what was there before is, and is answered; all goes on with room",
    rare=True,
)
def test_a_full_disk_ends_nothing_but_what_needs_room(tmp_path: Path, observed: Observed) -> None:
    with mounted(tmp_path / "data", mebibytes=96) as data_dir:
        server = Server(data_dir, RATE).start()
        watched = Watched(server)
        client = watched.client
        try:
            older = jobs.wait(client, watched.create("short"), ended, seconds=300)
            file = watched.upload(rows(12))
            ballast = fill(data_dir)
            upload = refusal(lambda: client.files.create(file=("rows.jsonl", rows(4000)), purpose="fine-tune"))
            assert upload is not None and (upload.status_code, upload.code) == (507, "insufficient_storage")
            create = refusal(lambda: client.fine_tuning.jobs.create(model="tiny", training_file=file))
            assert create is not None and (create.status_code, create.code) == (507, "insufficient_storage")
            watched.answers(str(older.fine_tuned_model))
            assert client.files.content(file).content == rows(12)
            ballast.unlink()
            ballast = fill(data_dir, but=600_000)
            job = watched.create("short")
            eventually(lambda: jobs.trainers(data_dir), "no trainer")
            eventually(lambda: not jobs.trainers(data_dir), "the trainer does not end")
            ballast.unlink()
            full = jobs.wait(client, job, ended, seconds=300)
            assert full.status == "failed" and full.error is not None and full.error.code == "disk_full", full.error
            assert client.fine_tuning.jobs.retrieve(older.id) == older
            after = jobs.wait(client, watched.create("short"), ended, seconds=300)
            assert after.status == "succeeded", after.error
            watched.settle_files()
        finally:
            server.stop(timeout=120)
        assert "Traceback" not in server.log, server.log
    told = f"{upload.status_code} and {create.status_code}; {full.status}, {full.error.code}"
    observed(f"{told}; with room the next one {after.status}")


@pytest.mark.fault(
    "service",
    "a trainer that lost its service, and does not end",
    expected="the next one waits for the device, then goes on; each step once",
    rare=True,
)
def test_an_orphan_keeps_its_device(tmp_path: Path, observed: Observed) -> None:
    server = Server(tmp_path / "data", RATE)
    server.data_dir.mkdir()
    watched, orphan = Watched(server.start()), 0
    try:
        job = watched.create("long")
        jobs.training(server, job, step=2)
        orphan = jobs.trainers(server.data_dir)[job]
        os.kill(orphan, signal.SIGSTOP)
        server.stop(signal.SIGKILL)
        server.start()

        eventually(lambda: len(jobs.trainer_processes(server.data_dir)) == 2, "no second trainer was started")
        time.sleep(8)  # for what must not happen: that it begins
        meanwhile = at_work(server.data_dir)
        assert meanwhile in ([orphan], [])
        os.kill(orphan, signal.SIGCONT)
        watched.settle()
        assert watched.jobs[job].status == "succeeded"
    finally:
        if orphan in [process for _, process in jobs.trainer_processes(server.data_dir)]:
            with suppress(ProcessLookupError):  # stopped, it would outlive the tests
                os.kill(orphan, signal.SIGKILL)
        server.stop(timeout=120)
    observed(f"{len(meanwhile)} at work beside the one that waited; {watched.jobs[job].status}, no step twice")


@pytest.mark.fault(
    "service",
    "it is to stop while another process has the records locked, beside a training",
    expected="it ends with its trainer while they are locked; the job goes on at the next start, no step twice",
    rare=True,
)
def test_it_stops_beside_a_locked_store(tmp_path: Path, observed: Observed) -> None:
    server = Server(tmp_path / "data", RATE)
    server.data_dir.mkdir()
    watched = Watched(server.start())
    try:
        job = watched.create("long")
        jobs.training(server, job, step=2)
        with held(server.data_dir / "store.sqlite"):
            time.sleep(1)  # so that its next look at the records waits
            code = server.stop(timeout=60)  # less than the 90 s that systemd gives it
            assert not jobs.trainer_processes(server.data_dir), "it ended before its trainer"
        server.start()
        watched.settle()
        assert watched.jobs[job].status == "succeeded"
    finally:
        server.stop(timeout=120)
    assert "Traceback" not in server.log, server.log
    observed(f"exit code {code} and no trainer left, the lock still held; then {watched.jobs[job].status}")
