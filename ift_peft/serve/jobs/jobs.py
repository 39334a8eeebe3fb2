"""The fine-tuning jobs of a service: made, withdrawn, and gone on with."""

from __future__ import annotations

import logging
import threading
import time
from queue import Empty, SimpleQueue

from sqlalchemy import select, update

from ift_peft.serve.errors import ApiError
from ift_peft.serve.jobs.attempt import Attempt, withdraw
from ift_peft.serve.jobs.body import CreateJob
from ift_peft.serve.jobs.creating import make_job
from ift_peft.serve.jobs.folder import JobFolder
from ift_peft.serve.jobs.queue import Queue
from ift_peft.serve.jobs.records import ACTIVE, change, job_record, tell
from ift_peft.serve.jobs.repeated import Asked, Caller
from ift_peft.serve.jobs.results import clear_cancelled
from ift_peft.serve.objects import FINAL
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Record, Store, StoreUnavailable
from ift_peft.serve.store.check import opening
from ift_peft.serve.store.tables import jobs

log = logging.getLogger("ift_peft.serve")
LOOK_SECONDS = 60.0  # between two looks for jobs that the queue has not
STOP_SECONDS = 10.0


class Jobs:
    """Jobs over a store. What was acknowledged is in the store; the queue is brought to it at each start."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store
        self.queue = Queue(settings.queue_url, self._attempt)
        self._creating = threading.Lock()  # a repeated request waits for the one that it repeats
        self._stopped = threading.Event()
        self._due: SimpleQueue[Record | None] = SimpleQueue()
        self._looking = threading.Thread(target=self._look, name="jobs", daemon=True)

    def start(self) -> None:
        """Go on with every job that is neither final nor paused, and first with the one that was at work."""
        self._remove_unknown()
        active = self.store.every(select(jobs).where(jobs.c.status.in_(ACTIVE)).order_by(jobs.c.number))
        with self.store.begin() as connection:  # nothing is at work: another one may be more urgent by now
            at_work = jobs.c.status.in_(("running", "validating_files"))
            connection.execute(update(jobs).where(at_work).values(status="queued", estimated_finish=None))
        with opening(self.settings.queue_url):
            self.queue.start()
        for record in sorted(active, key=lambda record: record["status"] == "queued"):
            self._put_anew(record)
        ended = self.store.every(select(jobs.c.id).where(jobs.c.status.in_(("succeeded", "cancelled"))))
        for record in ended:
            JobFolder(self.settings.jobs / record["id"]).clear()
        self._looking.start()

    def _look(self) -> None:
        look_at = time.monotonic() + LOOK_SECONDS
        while not self._stopped.is_set():
            try:
                record = self._due.get(timeout=max(0.0, look_at - time.monotonic()))
            except Empty:
                look_at = time.monotonic() + LOOK_SECONDS
                self._look_again()
            else:
                if record is not None:
                    self._put_now(record)

    def _look_again(self) -> None:
        try:
            self.queue_again()
        except StoreUnavailable as error:
            log.warning("could not look for jobs that wait", extra={"code": error.code})
        except Exception as error:  # tried again at the next look
            log.error("could not queue the jobs that wait", exc_info=error)

    def queue_again(self) -> None:
        """Queue every job that is to be done: one that the queue could not take when it was made; others are there."""
        for record in self.store.every(select(jobs).where(jobs.c.status.in_(ACTIVE)).order_by(jobs.c.number)):
            self._put_anew(record)

    def _remove_unknown(self) -> None:
        """Folders of jobs that a crash kept from having a record: they hold rows, which no deletion would reach."""
        known = {record["id"] for record in self.store.every(select(jobs.c.id))}
        for path in self.settings.jobs.iterdir():
            if path.name not in known:
                JobFolder(path).clear()

    def stop(self) -> None:
        """Let the trainer write its checkpoint and end; its job goes on at the next start."""
        self._stopped.set()
        self._due.put(None)
        if self._looking.is_alive():
            self._looking.join(STOP_SECONDS)  # it may be waiting for a queue that another process has locked
        self.queue.stop()

    def create(self, body: CreateJob, caller: Caller) -> Record:
        """Make a job of `body`, or find the one that was made of the same request. Raises `ApiError`."""
        asked = Asked.of(body, caller)
        with self._creating:
            found = asked.made_before(self.store)
            if found is None:
                found = make_job(self.settings, self.store, body, asked)
        self._put_soon(found)
        return found

    def cancel(self, job: str, caller: Caller) -> Record:
        """End `job` now. Raises `ApiError` (400, which clients do not repeat) where it has ended."""
        record = job_record(self.store, job)
        repeated = caller.retries > 0 and record["status"] == "cancelled"
        if not repeated and not withdraw(self.store, job, to_cancelled=True):
            raise self._wrong_status(job, "cancelled")
        if record["status"] in ("paused", "queued"):  # otherwise, and again, its attempt does this when it has ended
            clear_cancelled(self.settings, job)
        return job_record(self.store, job)

    def pause(self, job: str, caller: Caller) -> Record:
        """Let `job` rest at a checkpoint. Raises `ApiError` (400) where it has ended or is paused."""
        record = job_record(self.store, job)
        repeated = caller.retries > 0 and record["status"] == "paused"
        if not repeated and not withdraw(self.store, job, to_cancelled=False):
            raise self._wrong_status(job, "paused")
        return job_record(self.store, job)

    def resume(self, job: str, caller: Caller) -> Record:
        """Queue `job` again, to go on at its checkpoint. Raises `ApiError` (400) where it is not paused."""
        record = job_record(self.store, job)
        if caller.retries > 0 and record["status"] in ACTIVE:
            return record
        with self.store.begin() as connection:
            attempt = int(record["attempt"])
            resumed = change(connection, job, to="queued", of=("paused",), attempt=attempt)
            if resumed:
                connection.execute(update(jobs).where(jobs.c.id == job).values(attempt=attempt + 1))
                tell(connection, job, "The job was resumed, and is queued")
        if not resumed:
            raise self._wrong_status(job, "resumed")
        record = job_record(self.store, job)
        self._put_soon(record)
        return record

    def _wrong_status(self, job: str, what: str) -> ApiError:
        status = job_record(self.store, job)["status"]
        has = "has ended as" if status in FINAL else "is"
        return ApiError(
            400, f"Job {job} {has} {status!r} and cannot be {what}.", code="invalid_status", param="fine_tuning_job_id"
        )

    def _put_soon(self, record: Record) -> None:
        """Queue a job that is in the store, and so will be done; no request waits for a queue that is locked."""
        if self._looking.is_alive():
            self._due.put(record)
        else:
            self._put_now(record)

    def _put_now(self, record: Record) -> None:
        """Where it fails, at the next look."""
        try:
            self._put(record)
        except Exception as error:
            log.error("could not queue a job; it is tried again", exc_info=error, extra={"job": record["id"]})

    def _put(self, record: Record) -> bool:
        """Whether the queue will do what there is to do; it does no attempt that it has once ended."""
        if record["status"] not in ACTIVE:
            return True
        return self.queue.put(record["id"], record["attempt"], priority=record["priority"])

    def _put_anew(self, record: Record) -> None:
        """Queue what there is to do; where the attempt broke off and the queue holds it for ended, as another one."""
        if self._put(record):
            return
        with self.store.begin() as connection:
            same = (jobs.c.id == record["id"], jobs.c.attempt == record["attempt"], jobs.c.status.in_(ACTIVE))
            connection.execute(update(jobs).where(*same).values(attempt=record["attempt"] + 1))
        self._put(job_record(self.store, record["id"]))

    def _attempt(self, job: str, number: int) -> None:
        Attempt(self.settings, self.store, self.queue.stopping, job, number).run()
