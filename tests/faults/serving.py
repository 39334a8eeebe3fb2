"""A service as its client sees it, with what must hold of it whatever was killed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_socket
from openai import APIStatusError, OpenAI
from openai.types.fine_tuning import FineTuningJob

from tests.serve import jobs
from tests.serve.conftest import OPEN, Server
from tests.serve.walk import rows

RATE = ("--requests-per-minute", "1000000")
FINAL = ("succeeded", "failed", "cancelled")
SECONDS = 240.0  # in which what must come has come, on a machine that does other things beside
SHORT: dict[str, Any] = {"training": {"max_steps": 3}, **jobs.QUICK}
LONG: dict[str, Any] = {"training": {"max_steps": 40}, **jobs.QUICK}
UNTEACHABLE = b'{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "%s"}]}\n'
DECAY: dict[str, Any] = {**jobs.QUICK, "training": {"max_steps": 8, "weight_decay": 1e38}}
GOOD = {"short": SHORT, "long": LONG}
POISON: dict[str, tuple[dict[str, Any], frozenset[str]]] = {
    "rows that teach nothing": (SHORT, frozenset({"invalid_training_file"})),
    "a weight decay that leaves no number": (DECAY, frozenset({"training_failed", "non_finite_loss", "diverged"})),
    "an adapter that cannot be built": (
        {**SHORT, "adapter": {"r": 4, "target_modules": ["no_such_module"]}},
        frozenset({"invalid_recipe"}),
    ),
    "more rows held out than there are": (
        {**SHORT, "data": {"test_size": 100_000}},
        frozenset({"invalid_training_file"}),
    ),
    "a rank that no memory holds": ({**SHORT, "adapter": {"r": 1 << 22}}, frozenset({"insufficient_memory"})),
}
"""Jobs that are accepted and must fail, and with which codes."""


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    """In the place of the one for all tests, where it is imported: sockets are refused but for loopback."""
    pytest_socket.socket_allow_hosts(["127.0.0.1", "::1"])
    yield
    pytest_socket._remove_restrictions()


@pytest.fixture(scope="session", autouse=True)
def _clients_are_closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def content_of(kind: str, number: int) -> bytes:
    """Rows for a job of a kind, other ones for each number."""
    content = rows(12, offset=100 * number)
    return content + UNTEACHABLE % ("很长".encode() * 4000) if kind == "rows that teach nothing" else content


def at_work(data_dir: Path) -> list[int]:
    """The trainer processes that hold a run: those that train, not those that wait for the device."""
    found = []
    for _, process in jobs.trainer_processes(data_dir):
        with suppress(OSError):
            held = [os.readlink(handle) for handle in Path(f"/proc/{process}/fd").iterdir()]
            if any(name.startswith(str(data_dir / "runs")) and name.endswith("/.lock") for name in held):
                found.append(process)
    return found


@dataclass
class Known:
    """What a client was told of one job, none of which may be taken back."""

    kind: str
    status: str = "new"
    told: set[str] = field(default_factory=set)
    """Ids of its events."""
    validated: bool = False
    withdrawn: set[str] = field(default_factory=set)
    """`paused`, `cancelled`: what the client asked for."""
    deaths: int = 0
    """How often its trainer was killed."""
    end: dict[str, Any] | None = None


@dataclass
class Watched:
    """A real server over `data_dir`, and what its client knows. Ask by `client`, then `check`."""

    server: Server
    files: dict[str, bytes] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    jobs: dict[str, Known] = field(default_factory=dict)
    chats: int = 0

    @property
    def client(self) -> OpenAI:
        return self.server.client(max_retries=0, timeout=600)  # beside others on few cores

    @property
    def is_up(self) -> bool:
        return self.server.process is not None and self.server.process.poll() is None

    def check(self) -> None:
        """Raises `AssertionError` where what was acknowledged is not there, or was changed."""
        there = {file.id for file in self.client.files.list(purpose="fine-tune")}
        assert there == set(self.files) - self.deleted, "files"
        listed = list(self.client.fine_tuning.jobs.list(limit=100))
        assert [job.id for job in listed] == list(reversed(self.jobs)), "jobs"
        for job in listed:
            self._check_job(job)
        assert len(at_work(self.server.data_dir)) <= 1, "trainers at work on one device"
        for job in listed:
            if str(job.status) == "running" and job.id not in jobs.trainers(self.server.data_dir):
                self._has_a_trainer_again(job.id)

    def _check_job(self, job: FineTuningJob) -> None:
        known, status = self.jobs[job.id], str(job.status)
        events = [event.id for event in self.client.fine_tuning.jobs.list_events(job.id, limit=100)]
        messages = [event.message for event in jobs.events(self.client, job.id)]
        assert len(events) == len(set(events)) and known.told <= set(events), "events"
        assert not (known.validated and status == "validating_files"), "files are validated once"
        for once in ("Files validated", "Fine-tuning job started", "The job failed", "The job has successfully"):
            assert sum(message.startswith(once) for message in messages) <= 1, (once, messages)
        if known.end is not None:
            assert job.to_dict() == known.end, "a job that has ended has changed"
        if known.status == "paused" and status != "paused":
            assert status == "cancelled" and "cancelled" in known.withdrawn, f"a paused job is {status}"
        if status in ("paused", "cancelled"):
            assert status in known.withdrawn, f"{status} without being asked for"
        if status == "failed":
            assert job.error is not None
            allowed = POISON[known.kind][1] if known.kind in POISON else frozenset[str]()
            allowed |= {"trainer_died"} if known.deaths >= 3 else set()
            assert job.error.code in allowed, job.error
        else:
            assert not (job.error and job.error.code), job.error
        if status == "succeeded":
            assert known.kind in GOOD and job.finished_at and job.trained_tokens and job.fine_tuned_model
        known.told, known.validated = set(events), any(one.startswith("Files validated") for one in messages)
        known.status = status
        if status in FINAL and known.end is None:
            known.end = job.to_dict()
            assert job.finished_at is not None
            if status == "succeeded":
                self.answers(str(job.fine_tuned_model))

    def answers(self, model: str) -> None:
        """The model, or base, answers a chat."""
        answer = self.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "第7次购买。"}], max_tokens=2
        )
        assert answer.model == model and answer.usage is not None and answer.usage.completion_tokens >= 1
        self.chats += 1

    def _has_a_trainer_again(self, job: str) -> None:
        def helped() -> bool:
            status = str(self.client.fine_tuning.jobs.retrieve(job).status)
            return status != "running" or job in jobs.trainers(self.server.data_dir)

        eventually(helped, f"{job} is running without a trainer")

    def create(self, kind: str, *, priority: int = 0, **options: Any) -> str:
        """A job of a kind of `GOOD` or `POISON` on rows of its own."""
        file = self.upload(content_of(kind, len(self.files)))
        recipe = GOOD[kind] if kind in GOOD else POISON[kind][0]
        body = {"recipe": recipe, "priority": priority}
        job = self.client.fine_tuning.jobs.create(
            model="tiny", training_file=file, seed=len(self.jobs), extra_body=body, **options
        )
        self.jobs[job.id] = Known(kind)
        return job.id

    def upload(self, content: bytes) -> str:
        made = self.client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
        self.files[made.id] = content
        return made.id

    def kill_trainers(self) -> list[str]:
        """SIGKILL to what trains or waits; whose they were."""
        killed = jobs.trainer_processes(self.server.data_dir)
        for job, process in killed:
            self.jobs[job].deaths += 1
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return [job for job, _ in killed]

    def settle(self) -> None:
        """Let what is paused go on, until every job has ended; nothing is left of what only jobs at work have."""
        for job, known in self.jobs.items():
            if known.status == "paused":
                self.client.fine_tuning.jobs.resume(job)
                known.status = "queued"

        def all_ended() -> bool:
            found = {str(job.status) for job in self.client.fine_tuning.jobs.list(limit=100)}
            return found <= set(FINAL)

        eventually(all_ended, "jobs have not ended", seconds=SECONDS + 60 * len(self.jobs))
        self.check()
        self.settle_files()
        for path in self.server.data_dir.glob("runs/*/2*/metrics.jsonl"):
            lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            steps = [line["step"] for line in lines if "loss" in line]
            assert steps == sorted(set(steps)), "steps twice"

    def settle_files(self) -> None:
        """Every file that was acknowledged has its content."""
        for file in set(self.files) - self.deleted:
            assert self.client.files.content(file).content == self.files[file], "content"


@contextmanager
def held(database: Path, how: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
    """Another process's writing transaction that does not end."""
    with closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as other:
        other.execute(how)
        yield other


def ended(job: FineTuningJob) -> bool:
    return str(job.status) in FINAL


def refusal(call: Callable[[], object]) -> APIStatusError | None:
    """What `call` was refused with, if it was."""
    try:
        call()
    except APIStatusError as error:
        return error
    return None


def eventually(condition: Callable[[], object], what: str, *, seconds: float = SECONDS) -> None:
    """Wait until `condition` holds. Raises `AssertionError` with `what` where it does not come to."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)
