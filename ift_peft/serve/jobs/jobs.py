"""The fine-tuning jobs of a service: made, withdrawn, and gone on with."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from sqlalchemy import Connection, null, select, update

from ift_peft.errors import IftPeftError
from ift_peft.serve.errors import ApiError, as_api_error
from ift_peft.serve.files.records import alive
from ift_peft.serve.ids import new_id
from ift_peft.serve.jobs.attempt import Attempt, withdraw
from ift_peft.serve.jobs.body import CreateJob, hyperparameters_of, suffix_of
from ift_peft.serve.jobs.folder import JobFolder
from ift_peft.serve.jobs.queue import Queue
from ift_peft.serve.jobs.recipes import plan
from ift_peft.serve.jobs.records import ACTIVE, change, job_record, now, tell
from ift_peft.serve.jobs.results import clear_cancelled
from ift_peft.serve.objects import FINAL
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Record, Store, StoreUnavailable
from ift_peft.serve.store.check import opening
from ift_peft.serve.store.tables import files, jobs, metadata_pairs, models

log = logging.getLogger("ift_peft.serve")
LOOK_SECONDS = 60.0  # between two looks for jobs that the queue has not
STOP_SECONDS = 10.0
RETRIED_SECONDS = 30 * 60  # after which an equal request is a new one, also where it says that it is repeated


@dataclass(frozen=True)
class Caller:
    """Who asks, and what says that they may have asked before."""

    authorization: str = ""
    retries: int = 0
    """How often the client has sent this request before, by its own count."""
    idempotency_key: str | None = None


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
        content = _written(body)
        keyed = caller.idempotency_key is not None
        request = _hash(caller.authorization, caller.idempotency_key if keyed else content, str(keyed))
        with self._creating:
            found = self._made_before(request, _hash(content), caller)
            if found is None:
                found = self._create(body, request, _hash(content) if keyed else None)
        self._put_soon(found)
        return found

    def _made_before(self, request: str, content: str, caller: Caller) -> Record | None:
        if caller.idempotency_key is None and caller.retries < 1:
            return None
        query = select(jobs).where(jobs.c.request == request).order_by(jobs.c.number.desc())
        if caller.idempotency_key is None:
            query = query.where(jobs.c.created_at >= now() - RETRIED_SECONDS)
        found = self.store.one(query)
        if found is not None and found["body"] not in (None, content):
            raise ApiError(
                400, "This Idempotency-Key was used for another request.", code="idempotency_key_reused", param=None
            )
        return found

    def _create(self, body: CreateJob, request: str, content: str | None) -> Record:
        given, suffix = hyperparameters_of(body), suffix_of(body)
        base = self._base(body.model)
        job, seed = new_id("ftjob"), secrets.randbelow(2**31) if body.seed is None else body.seed
        folder = JobFolder(self.settings.jobs / job)
        try:
            rows = self._take(body.training_file, folder, folder.training, param="training_file")
            if body.validation_file is not None:
                self._take(body.validation_file, folder, folder.validation, param="validation_file")
            try:
                planned = plan(
                    name=job,
                    base=self.settings.bases[base],
                    device=self.settings.device,
                    seed=seed,
                    given=given,
                    above=body.recipe or {},
                    rows=rows,
                    tested=body.validation_file is not None,
                )
            except IftPeftError as error:
                raise as_api_error(error, param="recipe") from None
            with self.store.begin() as connection:
                self._still_there(connection, body)
                waits = connection.execute(select(jobs.c.id).where(jobs.c.status.in_(ACTIVE))).first() is not None
                connection.execute(
                    jobs.insert().values(
                        id=job,
                        created_at=now(),
                        status="queued" if waits else "validating_files",
                        attempt=0,
                        priority=body.priority,
                        model=body.model,
                        base=base,
                        recipe=planned.values,
                        hyperparameters=given.model_dump(),
                        resolved=planned.hyperparameters.model_dump(),
                        suffix=suffix or None,
                        seed=seed,
                        metadata=null() if body.metadata is None else body.metadata,
                        training_file=body.training_file,
                        validation_file=body.validation_file,
                        result_files=[],
                        error=null(),
                        request=request,
                        body=content,
                    )
                )
                for key, value in (body.metadata or {}).items():
                    connection.execute(metadata_pairs.insert().values(job=job, key=key, value=value))
                self._tell_created(connection, job, body, waits=waits)
        except BaseException:
            folder.clear()
            raise
        return job_record(self.store, job)

    @staticmethod
    def _tell_created(connection: Connection, job: str, body: CreateJob, *, waits: bool) -> None:
        tell(connection, job, f"Created fine-tuning job: {job}")
        if waits:
            tell(connection, job, "Waiting for the jobs before it; its files are validated when its turn comes")
        tell(connection, job, f"Validating training file: {body.training_file}")
        if body.validation_file is None:
            held_out = "No validation file: a share of the training rows is held out, and measured before and after"
            tell(connection, job, held_out, level="warn")
        else:
            tell(connection, job, f"Validating validation file: {body.validation_file}")

    def _base(self, model: str) -> str:
        """The public name of an allowed base. Raises `ApiError` for any other model."""
        if model in self.settings.bases:
            return model
        if self.store.one(select(models.c.id).where(models.c.name == model)) is not None:
            raise ApiError(
                400,
                f"{model!r} is a tuned model; a job begins from a base ({', '.join(self.settings.bases)}). "
                "Train on the rows of both jobs together instead.",
                code="model_not_available",
                param="model",
            )
        raise ApiError(
            400,
            f"The model {model!r} is not one of those that can be fine-tuned: {', '.join(self.settings.bases)}.",
            code="model_not_available",
            param="model",
        )

    def _take(self, file: str, folder: JobFolder, target: Path, *, param: str) -> int:
        """Keep an uploaded file for the job; how many rows it has. Raises `ApiError` where it cannot be used."""
        found = self.store.one(select(files).where(files.c.id == file, alive()))
        if found is None:
            raise _no_file(file, param)
        if found["purpose"] != "fine-tune":
            message = f"The purpose of {file!r} is {found['purpose']!r}, not 'fine-tune'."
            raise ApiError(400, message, code=f"invalid_{param}", param=param)
        try:
            folder.take(self.settings.files / found["id"], target)
        except FileNotFoundError:
            raise _no_file(file, param) from None
        if found["rows"] is not None:
            return int(found["rows"])
        with target.open("rb") as lines:
            return sum(1 for line in lines if line.strip())

    @staticmethod
    def _still_there(connection: Connection, body: CreateJob) -> None:
        """A file that was deleted while the job was made was deleted before it. Raises `ApiError`."""
        for param, file in (("training_file", body.training_file), ("validation_file", body.validation_file)):
            query = select(files.c.id).where(files.c.id == file, alive()).with_for_update(read=True)
            if file is not None and connection.execute(query).first() is None:
                raise _no_file(file, param)

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


def _no_file(file: str, param: str) -> ApiError:
    return ApiError(400, f"No such file: {file!r}.", code=f"invalid_{param}", param=param)


def _written(body: CreateJob) -> str:
    """The request as JSON, the same for the same. Raises `ApiError` for what JSON or UTF-8 does not have."""
    try:
        content = json.dumps(body.model_dump(), sort_keys=True, ensure_ascii=False, allow_nan=False)
        content.encode()
    except (ValueError, RecursionError) as error:
        message = f"recipe: {type(error).__name__}: a number, a character or a depth that JSON in UTF-8 does not have"
        raise ApiError(400, message, code="invalid_value", param="recipe") from None
    return content


def _hash(*parts: Any) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()
