"""What a service that is killed at random moments still knows of what it acknowledged.

    python -m benchmarks.kill_service --kills 20

A client uploads files, makes jobs, pauses, resumes and cancels some; at random moments the service, or its trainer, or
both get SIGKILL, SIGTERM or SIGINT, and the service is started again. Every answer of 200 is noted. In the end each
acknowledged file must be there with its content, each job once and, when all is quiet, ended as was asked for; and no
run may hold a step twice, as where two trainers were at it. Written to benchmarks/results/kill_service.json.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from openai import APIError, OpenAI

from benchmarks.record import write_result
from tests.serve.conftest import Server
from tests.serve.walk import rows

RECIPE: dict[str, Any] = {"training": {"max_steps": 12}, "evaluation": {"forgetting": False}}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TRAINER = "ift_peft.serve.jobs.trainer"


@dataclass
class Known:
    """What the service has answered with 200."""

    files: dict[str, bytes] = field(default_factory=dict)
    jobs: list[str] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)
    not_done: int = 0


def trainers(server: Server) -> list[psutil.Process]:
    """Trainer processes of this service."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if TRAINER in words and any(word.startswith(str(server.data_dir)) for word in words):
            found.append(process)
    return found


def work(client: OpenAI, known: Known, rng: random.Random, stop: threading.Event, most: int) -> None:
    """Ask for one thing after another until `stop`; what is not answered is not noted."""
    while not stop.is_set():
        with contextlib.suppress(APIError):
            known.not_done += 1
            _one(client, known, rng, most)
            known.not_done -= 1
        stop.wait(rng.uniform(0.05, 0.4))


def _one(client: OpenAI, known: Known, rng: random.Random, most: int) -> None:
    what = rng.random()
    if what < 0.4 or not known.files:
        content = rows(10 + len(known.files))
        known.files[client.files.create(file=("a.jsonl", content), purpose="fine-tune").id] = content
    elif what < 0.6 and len(known.jobs) < most:
        file = rng.choice(list(known.files))
        made = client.fine_tuning.jobs.create(
            model="tiny", training_file=file, seed=len(known.jobs), extra_body={"recipe": RECIPE}
        )
        known.jobs.append(made.id)
    elif known.jobs:
        job = rng.choice(known.jobs)
        if what < 0.65 and len(known.cancelled) < most // 3:
            client.fine_tuning.jobs.cancel(job)
            known.cancelled.add(job)
        elif what < 0.8:
            client.fine_tuning.jobs.pause(job)
        else:
            client.fine_tuning.jobs.resume(job)


def kill(server: Server, rng: random.Random) -> str:
    """Send a signal to the service, its trainer, or both, wait for the service's end, and start it again."""
    number, whom = rng.choice(SIGNALS), rng.choice(("service", "trainer", "both"))
    if whom != "service":
        for process in trainers(server):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
    if whom != "trainer":
        server.stop(number, timeout=120)
        server.start()
    return f"{signal.Signals(number).name} of {whom}"


def main(
    kills: Annotated[int, typer.Option(help="How often to kill.")] = 20,
    jobs: Annotated[int, typer.Option(help="Jobs at most.")] = 12,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    rng, known, stop, killed = random.Random(seed), Known(), threading.Event(), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        server = Server(Path(name) / "data", ("--requests-per-minute", "1000000"))
        server.data_dir.mkdir()
        server.start()
        client = server.client(max_retries=0, timeout=60)
        thread = threading.Thread(target=work, args=(client, known, random.Random(seed + 1), stop, jobs), daemon=True)
        thread.start()
        try:
            for _ in range(kills):
                time.sleep(rng.uniform(1, 15))
                killed[kill(server, rng)] += 1
                print(f"{sum(killed.values())} kills, {len(known.files)} files, {len(known.jobs)} jobs", flush=True)
            stop.set()
            thread.join(90)
            result = {"killed": dict(killed), **_outcome(server, client, known)}
        finally:
            server.stop(signal.SIGKILL)
    print(result)
    write_result("kill_service", result)
    wrong = ("files_lost", "jobs_lost", "jobs_doubled", "not_cancelled", "not_ended", "failed", "steps_twice")
    raise typer.Exit(int(any(result[key] for key in wrong)))


def _steps_twice(server: Server) -> int:
    """Runs whose steps do not follow one another."""
    wrong = 0
    for path in server.data_dir.glob("runs/*/*/metrics.jsonl"):
        steps = [line["step"] for line in map(json.loads, path.read_text("utf-8").splitlines()) if "loss" in line]
        wrong += steps != sorted(set(steps))
    return wrong


def _outcome(server: Server, client: OpenAI, known: Known) -> dict[str, Any]:
    """Let what is paused go on and all jobs end, then compare."""
    for _ in range(3600):
        now = {job.id: job for job in client.fine_tuning.jobs.list(limit=100)}
        for job in now.values():
            if str(job.status) == "paused":
                client.fine_tuning.jobs.resume(job.id)
        if all(str(job.status) in ("succeeded", "failed", "cancelled") for job in now.values()):
            break
        time.sleep(1)
    there = {file.id for file in client.files.list(purpose="fine-tune")}
    kept = [one for one, content in known.files.items() if one in there and client.files.content(one).read() == content]
    listed = [job.id for job in client.fine_tuning.jobs.list(limit=100)]
    statuses = Counter(str(job.status) for job in now.values())
    for job in now.values():
        if job.status == "failed":
            print(job.id, job.error)
    return {
        "files": len(known.files),
        "files_lost": len(known.files) - len(kept),
        "jobs": len(known.jobs),
        "jobs_lost": len(set(known.jobs) - set(listed)),
        "jobs_doubled": len(listed) - len(set(listed)),
        "refused_or_unanswered": known.not_done,
        "statuses": dict(statuses),
        "not_cancelled": sum(now[job].status != "cancelled" for job in known.cancelled),
        "not_ended": sum(job.status not in ("succeeded", "failed", "cancelled") for job in now.values()),
        "failed": statuses["failed"],
        "steps_twice": _steps_twice(server),
    }


if __name__ == "__main__":
    typer.run(main)
