"""Jobs that are paused, cancelled and killed, with the service or by themselves: nothing is lost, and nothing twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from ift_peft.run_dir import RunDir
from tests.serve import jobs
from tests.serve.conftest import Server

pytestmark = pytest.mark.slow
STEPS = 70
OPTIONS: dict[str, Any] = {
    "seed": 3,
    "hyperparameters": {"batch_size": 4},
    "extra_body": {"recipe": {**jobs.QUICK, "training": {"max_steps": STEPS}}},
}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with server.client(max_retries=0) as client:
        yield client


def create(server: Server, client: OpenAI) -> str:
    """A job of `STEPS` steps, each long enough for a test to come between."""
    rows = jobs.upload(server.data_dir, jobs.chats(24, length=6))
    return jobs.create(server, client=client, training_file=rows, **OPTIONS).id


def outcome(server: Server, client: OpenAI, job: str) -> tuple[list[tuple[int, float]], bytes]:
    """The loss of each step, and the adapter, of a job that is to succeed."""
    found = jobs.ended(client, job)
    assert found.status == "succeeded", found.error
    (model,) = jobs.records(server.data_dir, "select * from models where name = ?", found.fine_tuned_model)
    run = RunDir(server.data_dir / model["run"])
    logged = [line["step"] for line in run.read_lines("metrics.jsonl")]
    assert logged == list(range(1, STEPS + 1))  # two trainers at once would have written steps twice
    assert len(list((server.data_dir / "runs" / job).glob("*/manifest.json"))) == 2  # with `latest`, which is the same
    return jobs.losses(client, job), (run.adapter / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(server: Server, client: OpenAI) -> tuple[list[tuple[int, float]], bytes]:
    """A job that nothing interrupted."""
    return outcome(server, client, create(server, client))


def test_a_paused_killed_and_stopped_job_becomes_what_it_would_have_become(
    server: Server, client: OpenAI, whole: tuple[list[tuple[int, float]], bytes]
) -> None:
    job = create(server, client)
    jobs.training(server, job, step=5)
    assert client.fine_tuning.jobs.pause(job).status == "paused"
    jobs.wait_for(lambda: not jobs.trainers(server.data_dir))
    (run,) = {path.resolve() for path in (server.data_dir / "runs" / job).iterdir()}
    assert RunDir(run).status == "interrupted" and list((run / "checkpoints").iterdir())
    taken = len(RunDir(run).read_lines("metrics.jsonl"))
    assert 5 <= taken < STEPS and client.fine_tuning.jobs.retrieve(job).status == "paused"
    assert client.fine_tuning.jobs.resume(job).status == "queued"
    jobs.training(server, job, step=taken + 5)
    server.stop(signal.SIGKILL)
    server.start()
    jobs.training(server, job, step=jobs.logged(server, job) + 5)
    server.stop(signal.SIGTERM)
    assert not jobs.trainers(server.data_dir)
    _forget(server, job)
    moved = server.data_dir.with_name("moved")  # no record, and no file of the run, names the folder
    server.data_dir.rename(moved)
    server.data_dir.with_suffix(".log").rename(moved.with_suffix(".log"))
    server.data_dir = moved
    server.start()
    assert client.fine_tuning.jobs.retrieve(job).status in ("queued", "running")
    assert outcome(server, client, job) == whole
    told = [event.message for event in jobs.events(client, job)]
    assert told.count("Files validated, moving job to queued state") == 1


def _forget(server: Server, job: str) -> None:
    """A queue that knows nothing of a job which it had left to go on with: the store decides."""
    queue = sqlite3.connect(server.data_dir / "queue.sqlite")
    mine = f"from workflow_status where workflow_uuid = '{job}.1'"
    assert queue.execute(f"select status {mine}").fetchone() == ("PENDING",)
    queue.execute(f"delete {mine}")
    queue.commit()
    queue.close()


def test_one_trainer_at_a_time_in_the_order_of_priorities(server: Server, client: OpenAI) -> None:
    def only(job: str) -> None:
        jobs.wait_for(lambda: set(jobs.trainers(server.data_dir)) == {job})

    def queued(priority: int) -> str:
        body = {"recipe": jobs.QUICK, "priority": priority}
        return jobs.create(server, client=client, extra_body=body).id

    with jobs.device_held(server.data_dir):
        first = queued(0)
        only(first)
        later, sooner = queued(5), queued(-5)
        assert client.fine_tuning.jobs.cancel(first).status == "cancelled"
        only(sooner)
        client.fine_tuning.jobs.pause(sooner)
        only(later)
        client.fine_tuning.jobs.resume(sooner)
        client.fine_tuning.jobs.cancel(later)
        only(sooner)
        assert client.fine_tuning.jobs.retrieve(sooner).status == "validating_files"
        assert not (server.data_dir / "runs" / sooner).exists()
        killed = jobs.trainers(server.data_dir)[sooner]
        os.kill(killed, signal.SIGKILL)
        jobs.wait_for(lambda: jobs.trainers(server.data_dir).get(sooner, killed) != killed)
        told = [event.message for event in jobs.events(client, sooner)]
        assert told[0] == "The trainer was stopped from outside; it is started again"
        client.fine_tuning.jobs.pause(sooner)
        client.fine_tuning.jobs.cancel(sooner)
        jobs.wait_for(lambda: not jobs.trainers(server.data_dir))
    for job in (first, later, sooner):
        assert client.fine_tuning.jobs.retrieve(job).status == "cancelled"
        assert jobs.events(client, job)[0].message == "The job was cancelled"
        jobs.wait_for(lambda job=job: not (server.data_dir / "jobs" / job).exists())


def test_a_trainer_whose_parent_is_gone_does_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ift_peft.serve.jobs.trainer", str(tmp_path), "1"]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 130
    assert list(tmp_path.iterdir()) == []
