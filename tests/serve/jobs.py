"""Uploaded files, put where the service keeps them, and jobs followed to their end."""

from __future__ import annotations

import fcntl
import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from ift_peft.serve.ids import new_id
from tests.serve import inside
from tests.serve.conftest import Server

QUICK: dict[str, Any] = {"evaluation": {"forgetting": False, "bootstrap_samples": 100}, "adapter": {"r": 4}}
"""A recipe of which a job on a few rows takes seconds beside importing."""
wait_for = partial(inside.wait_for, seconds=120)


def chats(count: int = 12, *, length: int = 1) -> list[dict[str, Any]]:
    """Rows of a chat, invented: each with a question, `length` times as long, and an answer of its own."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"第 {number} 件商品怎么样？" * length},
                {"role": "assistant", "content": f"编号 {number}，质量不错。"},
            ]
        }
        for number in range(count)
    ]


def upload(data_dir: Path, rows: Sequence[dict[str, Any]], *, purpose: str = "fine-tune", counted: bool = True) -> str:
    """A file of `rows` as an upload leaves it; its id."""
    name = new_id("file")
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (data_dir / "files" / name).write_bytes(content)
    values = (name, int(time.time()), "rows.jsonl", purpose, len(content), hashlib.sha256(content).hexdigest())
    with sqlite3.connect(data_dir / "store.sqlite", timeout=30) as store:
        store.execute(
            "insert into files (id, created_at, filename, purpose, bytes, sha256, rows) values (?, ?, ?, ?, ?, ?, ?)",
            (*values, len(rows) if counted else None),
        )
    store.close()
    return name


def create(server: Server, *, client: OpenAI, rows: int = 12, **options: Any) -> FineTuningJob:
    """A job on a few rows over `tiny`; `options` go to `fine_tuning.jobs.create`."""
    options.setdefault("training_file", upload(server.data_dir, chats(rows)))
    options.setdefault("extra_body", {"recipe": QUICK})
    options.setdefault("model", "tiny")
    return client.fine_tuning.jobs.create(**options)


@contextmanager
def device_held(data_dir: Path) -> Iterator[None]:
    """Hold the device as a trainer would that lost its service: those that come after it wait."""
    devices = data_dir / "devices"
    devices.mkdir(exist_ok=True)
    with (devices / "cpu.lock").open("w") as device:
        fcntl.flock(device, fcntl.LOCK_EX)
        yield


def wait(client: OpenAI, job: str, until: Callable[[FineTuningJob], bool], *, seconds: float = 120) -> FineTuningJob:
    """The job, once `until` is true of it."""
    for _ in range(int(seconds / 0.1)):
        found = client.fine_tuning.jobs.retrieve(job)
        if until(found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{found.to_json()}\n{[event.message for event in events(client, job)]}")


def ended(client: OpenAI, job: str) -> FineTuningJob:
    """The job at its end."""
    return wait(client, job, lambda found: found.status in ("succeeded", "failed", "cancelled"))


def training(server: Server, job: str, *, step: int) -> None:
    """Wait until the job has taken `step` steps."""
    wait_for(lambda: logged(server, job) >= step)


def logged(server: Server, job: str) -> int:
    """How many steps the job's run has logged; faster to see than the events that come of it."""
    files = [path for path in (server.data_dir / "runs" / job).glob("2*/metrics.jsonl") if path.is_file()]
    return sum(path.read_bytes().count(b"\n") for path in files)


def losses(client: OpenAI, job: str) -> list[tuple[int, float]]:
    """Step and training loss of each metrics event, in the order in which they were told."""
    told = (event.data for event in reversed(events(client, job)) if event.type == "metrics")
    return [(data["step"], data["train_loss"]) for data in told if isinstance(data, dict) and "train_loss" in data]


def events(client: OpenAI, job: str) -> list[FineTuningJobEvent]:
    """All events of a job, the newest first."""
    return list(client.fine_tuning.jobs.list_events(job, limit=100))


def records(data_dir: Path, query: str, *values: Any) -> list[dict[str, Any]]:
    """Rows of the service's store."""
    store = sqlite3.connect(data_dir / "store.sqlite", timeout=30)
    store.row_factory = sqlite3.Row
    try:
        return [dict(row) for row in store.execute(query, values)]
    finally:
        store.close()


def trainers(data_dir: Path) -> dict[str, int]:
    """The jobs that have a trainer process, and its id."""
    return dict(trainer_processes(data_dir))


def trainer_processes(data_dir: Path) -> list[tuple[str, int]]:
    """The job and the id of each trainer process: a job has two where one of them lost its service."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "ift_peft.serve.jobs.trainer" in words:
            folder = Path(words[words.index("ift_peft.serve.jobs.trainer") + 1])
            if folder.parent.parent == data_dir:
                found.append((folder.name, int(path.parent.name)))
    return found
