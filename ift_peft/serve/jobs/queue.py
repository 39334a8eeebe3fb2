"""The queue of jobs: DBOS, which keeps what waits and what runs on disk, and runs again what a kill broke off."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from dbos import DBOS, SetEnqueueOptions, SetWorkflowID

NAME = "fine-tuning"
VERSION = "1"  # DBOS's own would be a hash of the source, and an edit would strand the jobs of the version before
POLL_SECONDS = 0.5
UNFINISHED = ("ENQUEUED", "PENDING", "DELAYED")
LOWEST = -100  # of the priorities; DBOS counts them from 1


def _is_not_raised(record: logging.LogRecord) -> bool:
    """What keeps DBOS from a start is logged by it, with its traceback, and raised."""
    return not record.getMessage().startswith("DBOS failed to launch")


class Stopping(BaseException):
    """The service stops. DBOS records an `Exception` as the end of a workflow; after this one it goes on at a start."""


class Queue:
    """Attempts at jobs, one at a time on one device, the smallest priority first and then in order."""

    def __init__(self, url: str, work: Callable[[str, int], None]) -> None:
        """`work` is called with a job and its attempt; what it raises but `Stopping` is the attempt's end."""
        self.url, self.work = url, work
        self.stopping = threading.Event()
        self._idle = threading.Condition()
        self._at_work = 0

    def start(self) -> None:
        """Begin with what waits, and with what was broken off."""
        logging.getLogger("dbos").setLevel(logging.WARNING)
        DBOS(
            config={
                "name": "ift-peft",
                "system_database_url": self.url,
                "application_version": VERSION,
                "executor_id": "local",
                "enable_otlp": False,
                "log_level": "WARNING",
            }
        )

        @DBOS.workflow(name="attempt", max_recovery_attempts=1_000_000)
        def attempt(job: str, number: int) -> None:
            self._run(job, number)

        self._workflow = attempt
        logging.getLogger("dbos").addFilter(_is_not_raised)
        DBOS.launch()
        DBOS.register_queue(NAME, worker_concurrency=1, polling_interval_sec=POLL_SECONDS, on_conflict="always_update")

    def stop(self, *, timeout: float = 60.0) -> None:
        """Let what runs stop by `stopping`, and end. It is left as it is, and goes on at the next start."""
        self.stopping.set()
        with self._idle:
            self._idle.wait_for(lambda: self._at_work == 0, timeout)
        DBOS.destroy(destroy_registry=True)

    def put(self, job: str, attempt: int, *, priority: int) -> bool:
        """Queue an attempt; one that was queued before is not queued again. Whether it waits or is at work."""
        with SetWorkflowID(f"{job}.{attempt}"), SetEnqueueOptions(priority=priority - LOWEST + 1):
            handle = DBOS.enqueue_workflow(NAME, self._workflow, job, attempt)
        return handle.get_status().status in UNFINISHED

    def _run(self, job: str, attempt: int) -> None:
        with self._idle:
            self._at_work += 1
        try:
            if self.stopping.is_set():
                raise Stopping
            self.work(job, attempt)
        finally:
            with self._idle:
                self._at_work -= 1
                self._idle.notify_all()
