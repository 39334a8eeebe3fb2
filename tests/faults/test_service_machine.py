"""What a client may ask, and what may be killed, in any order: a state machine over the real server.

Not derandomised with --all-faults: hypothesis prints the steps of a failure, and a decorator that reproduces it.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from openai import OpenAI

from tests.faults.conftest import Observed
from tests.faults.serving import (
    FINAL,
    GOOD,
    POISON,
    RATE,
    SHORT,
    Known,
    Watched,
    _clients_are_closed,
    _no_network,
    eventually,
    refusal,
)
from tests.serve import jobs
from tests.serve.conftest import OPEN, Server
from tests.serve.walk import rows

__all__ = ["_clients_are_closed", "_no_network"]
pytestmark = pytest.mark.slow
NUMBERS = st.integers(0, 1_000)
DELAYS = st.floats(0, 0.5)
KINDS = st.sampled_from([*GOOD, *GOOD, *POISON])


class ServiceMachine(RuleBasedStateMachine):
    """A client, a server, a trainer, and somebody who kills."""

    done: ClassVar[Counter[str]] = Counter()
    most_jobs: ClassVar[int] = 1  # of one example: each takes a trainer seconds

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ift_peft-machine-"))
        self.server = Server(self.folder / "data", RATE)
        self.server.data_dir.mkdir()
        self.watched = Watched(self.server)
        self.server.start()

    @initialize(kind=KINDS, delay=DELAYS, both=st.booleans())
    def the_first_job_is_killed(self, kind: str, delay: float, both: bool) -> None:
        """Each example has a kill at work: most orders of so few steps would have none."""
        self.watched.upload(rows(10))
        self._create(kind)
        self.wait_for_a_trainer(0)
        self.end_server(signal.SIGKILL, both, delay)
        self.start()

    def _create(self, kind: str, **options: Any) -> str:
        self.done["jobs"] += 1
        return self.watched.create(kind, **options)

    def _one(self, number: int) -> str:
        return list(self.watched.jobs)[number % len(self.watched.jobs)]

    def is_up(self) -> bool:
        return self.watched.is_up

    def is_down(self) -> bool:
        return not self.watched.is_up

    def has_room(self) -> bool:
        return self.watched.is_up and len(self.watched.jobs) < self.most_jobs

    @precondition(is_up)
    @rule(number=NUMBERS)
    def upload(self, number: int) -> None:
        self.watched.upload(rows(10 + number % 5))
        self.done["files"] += 1

    @precondition(has_room)
    @rule(kind=KINDS, priority=st.integers(-100, 100))
    def create(self, kind: str, priority: int) -> None:
        job = self._create(kind, priority=priority, suffix="of its own", metadata={"kind": kind})
        assert self.watched.client.fine_tuning.jobs.retrieve(job).metadata == {"kind": kind}

    @precondition(has_room)
    @rule()
    def create_twice(self) -> None:
        """As the client sends a request again of which it got no answer."""
        file = self.watched.upload(rows(12))
        made = {self._sent(file, retries) for retries in (0, 1, 2)}
        assert len(made) == 1, "one request has made several jobs"
        self.watched.jobs[made.pop()] = Known("short")
        self.done["jobs"] += 1

    def _sent(self, file: str, retries: int, *, client: OpenAI | None = None) -> str:
        made = (client or self.watched.client).fine_tuning.jobs.create(
            model="tiny",
            training_file=file,
            seed=len(self.watched.jobs),
            extra_headers={"x-stainless-retry-count": str(retries)},
            extra_body={"recipe": SHORT},
        )
        return made.id

    @precondition(has_room)
    @rule(delay=DELAYS)
    def create_through_a_kill(self, delay: float) -> None:
        """The unmodified client's own retries, while the server is killed and started again."""
        file = self.watched.upload(rows(12))
        client = OpenAI(base_url=f"{self.server.url}/v1", api_key="none", max_retries=12, timeout=120)
        OPEN.append(client)
        made: list[str] = []

        def ask() -> None:
            job = client.fine_tuning.jobs.create(
                model="tiny", training_file=file, seed=len(self.watched.jobs), extra_body={"recipe": SHORT}
            )
            made.append(job.id)

        asking = threading.Thread(target=ask)
        asking.start()
        asking.join(delay / 10)
        self._end(signal.SIGKILL)
        self.server.start()
        asking.join(200)
        assert len(made) == 1, "a create that was repeated was not answered"
        self.watched.jobs[made[0]] = Known("short")
        self.done["jobs"] += 1

    @precondition(is_up)
    @rule(number=NUMBERS)
    def pause(self, number: int) -> None:
        self._withdraw(number, "paused")

    @precondition(is_up)
    @rule(number=NUMBERS)
    def cancel(self, number: int) -> None:
        self._withdraw(number, "cancelled")

    def _withdraw(self, number: int, to: str) -> None:
        job = self._one(number)
        known = self.watched.jobs[job]
        of_jobs = self.watched.client.fine_tuning.jobs
        error = refusal(lambda: (of_jobs.pause if to == "paused" else of_jobs.cancel)(job))
        status = str(of_jobs.retrieve(job).status)
        if error is None:
            assert known.status not in FINAL and status == to
            known.withdrawn.add(to)
            self.done[to] += 1
        else:
            assert error.code == "invalid_status" and (status in FINAL or status == to), (status, error)

    @precondition(is_up)
    @rule(number=NUMBERS)
    def resume(self, number: int) -> None:
        job = self._one(number)
        known = self.watched.jobs[job]
        error = refusal(lambda: self.watched.client.fine_tuning.jobs.resume(job))
        assert (error is None) == (known.status == "paused"), error
        if error is None:
            known.status = "queued"
        else:
            assert error.code == "invalid_status"

    @precondition(is_up)
    @rule(number=NUMBERS)
    def delete_file(self, number: int) -> None:
        file = list(self.watched.files)[number % len(self.watched.files)]
        error = refusal(lambda: self.watched.client.files.delete(file))
        if error is None:
            self.watched.deleted.add(file)
        else:
            expected = (404, "not_found") if file in self.watched.deleted else (400, "file_in_use")
            assert (error.status_code, error.code) == expected, error

    @precondition(is_up)
    @rule(number=NUMBERS)
    def chat(self, number: int) -> None:
        ended = [
            str(one.end["fine_tuned_model"])
            for one in self.watched.jobs.values()
            if one.status == "succeeded" and one.end
        ]
        self.watched.answers((ended or ["tiny"])[number % max(1, len(ended))])

    @precondition(is_up)
    @rule(number=NUMBERS)
    def wait_for_a_job(self, number: int) -> None:
        job = self._one(number)

        def rests() -> bool:
            return str(self.watched.client.fine_tuning.jobs.retrieve(job).status) in (*FINAL, "paused")

        eventually(rests, f"{job} does not end", seconds=600)

    @precondition(is_up)
    @rule(number=NUMBERS)
    def wait_for_a_trainer(self, number: int) -> None:
        """So that what follows hits it at work."""
        waiting = [job for job, known in self.watched.jobs.items() if known.status not in (*FINAL, "paused")]
        if waiting:
            eventually(lambda: jobs.trainers(self.server.data_dir) or self._all_rest(), "no trainer is started")

    def _all_rest(self) -> bool:
        listed = self.watched.client.fine_tuning.jobs.list(limit=100)
        return all(str(job.status) in (*FINAL, "paused") for job in listed)

    @precondition(is_up)
    @rule(delay=DELAYS)
    def kill_trainer(self, delay: float) -> None:
        threading.Event().wait(delay)
        self.done["kills of trainers"] += len(self.watched.kill_trainers())

    @precondition(is_up)
    @rule(number=st.sampled_from([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]), both=st.booleans(), delay=DELAYS)
    def end_server(self, number: signal.Signals, both: bool, delay: float) -> None:
        threading.Event().wait(delay)
        if both:
            self.done["kills of trainers"] += len(self.watched.kill_trainers())
        self._end(number)

    def _end(self, number: signal.Signals) -> None:
        self.server.stop(number, timeout=120)
        self.done[f"{number.name} of the server"] += 1
        if number == signal.SIGTERM:
            assert not jobs.trainers(self.server.data_dir), "the service ended before its trainer"

    @precondition(is_down)
    @rule()
    def kill_an_orphan(self) -> None:
        """A trainer whose server was killed, which writes its checkpoint."""
        self.done["kills of trainers"] += len(self.watched.kill_trainers())

    @precondition(is_down)
    @rule()
    def start(self) -> None:
        self.server.start()

    @precondition(is_down)
    @rule()
    def start_at_once(self) -> None:
        """As often as `start`: most rules need a server."""
        self.start()

    @invariant()
    def all_is_there(self) -> None:
        if self.watched.is_up and self.watched.jobs:
            note(f"{ {job: known.status for job, known in self.watched.jobs.items()} }")
            self.watched.check()

    def teardown(self) -> None:
        try:
            if not self.watched.is_up:
                self.server.start()
            self.watched.settle()
            assert not jobs.trainers(self.server.data_dir)
            for known in self.watched.jobs.values():
                self.done[known.status] += 1
            self.done["chats"] += self.watched.chats
        finally:
            self.server.stop(timeout=120)
            note(self.server.log[-20_000:])
        assert "Traceback" not in self.server.log, self.server.log
        shutil.rmtree(self.folder)


@pytest.mark.fault(
    "service",
    "kill -9 and SIGTERM of trainer, server and both between requests and in one, in any order that hypothesis finds",
    expected="no file, job or event lost; statuses along their edges; an end is final; one trainer at a time; all end",
)
def test_whatever_is_killed_nothing_is_lost(observed: Observed, every: bool) -> None:
    ServiceMachine.done.clear()
    ServiceMachine.most_jobs = 4 if every else 1
    run_state_machine_as_test(
        ServiceMachine,
        settings=settings(
            max_examples=4 if every else 1,
            stateful_step_count=25 if every else 8,
            deadline=None,
            database=None,
            derandomize=not every,
            print_blob=True,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
    observed(", ".join(f"{count} {what}" for what, count in sorted(ServiceMachine.done.items())))
