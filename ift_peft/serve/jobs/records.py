"""What the store holds of jobs: their objects, their events, and the only ways in which a status changes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, null, select, update

from ift_peft.serve.errors import not_found
from ift_peft.serve.ids import ALPHABET, new_id
from ift_peft.serve.objects import (
    FINAL,
    CheckpointMetrics,
    Hyperparameters,
    Job,
    JobCheckpoint,
    JobError,
    JobEvent,
    Method,
    Status,
    Supervised,
)
from ift_peft.serve.store import Record, Store
from ift_peft.serve.store.tables import events, jobs

ACTIVE: tuple[Status, ...] = ("validating_files", "queued", "running")


def now() -> int:
    return int(time.time())


def derived_id(prefix: str, *parts: str) -> str:
    """An id that follows from others, which nobody can guess: what is written twice is then written once."""
    number = int.from_bytes(hashlib.sha256("\0".join((prefix, *parts)).encode()).digest(), "big")
    letters = []
    for _ in range(24):
        number, digit = divmod(number, len(ALPHABET))
        letters.append(ALPHABET[digit])
    return f"{prefix}-{''.join(letters)}"


def job_record(store: Store, job: str) -> Record:
    """Raises `ApiError` (404) where there is no such job."""
    found = store.one(select(jobs).where(jobs.c.id == job))
    if found is None:
        raise not_found("fine-tuning job", job, param="fine_tuning_job_id")
    return found


def job_object(record: Record, *, organization: str) -> Job:
    found = Hyperparameters.model_validate(record["hyperparameters"])
    running = record["status"] == "running"
    return Job(
        id=record["id"],
        created_at=record["created_at"],
        finished_at=record["finished_at"],
        estimated_finish=record["estimated_finish"] if running else None,
        model=record["model"],
        fine_tuned_model=record["fine_tuned_model"],
        organization_id=organization,
        status=record["status"],
        hyperparameters=found,
        method=Method(type="supervised", supervised=Supervised(hyperparameters=found)),
        training_file=record["training_file"],
        validation_file=record["validation_file"],
        result_files=record["result_files"],
        trained_tokens=record["trained_tokens"],
        error=None if record["error"] is None else JobError.model_validate(record["error"]),
        seed=record["seed"],
        metadata=record["metadata"],
    )


def event_object(record: Record) -> JobEvent:
    shown = {name: record[name] for name in ("id", "created_at", "level", "message", "type", "data")}
    return JobEvent.model_validate(shown)


def checkpoint_object(record: Record) -> JobCheckpoint:
    return JobCheckpoint(
        id=record["id"],
        created_at=record["created_at"],
        fine_tuned_model_checkpoint=record["name"],
        fine_tuning_job_id=record["job"],
        metrics=CheckpointMetrics.model_validate(record["metrics"]),
        step_number=record["step"],
    )


def tell(
    connection: Connection,
    job: str,
    message: str,
    *,
    level: str = "info",
    kind: str = "message",
    data: dict[str, Any] | None = None,
) -> None:
    """One more event of `job`, in the transaction of `connection`."""
    connection.execute(
        events.insert().values(
            id=new_id("ftevent"),
            job=job,
            created_at=now(),
            level=level,
            type=kind,
            message=message,
            data=null() if data is None else data,
        )
    )


def change(
    connection: Connection,
    job: str,
    *,
    to: Status,
    of: Sequence[str] = ACTIVE,
    attempt: int | None = None,
    **values: Any,
) -> bool:
    """Give `job` the status `to` where its status is one of `of`, and where it is at `attempt`; whether it was.

    A final status is never among `of`: it stays. `values` are written with it.
    """
    assert not set(of) & set(FINAL)
    if to in FINAL:
        values = {"finished_at": now(), "estimated_finish": None, **values}
    query = update(jobs).where(jobs.c.id == job, jobs.c.status.in_(of)).values(status=to, **values)
    if attempt is not None:
        query = query.where(jobs.c.attempt == attempt)
    return connection.execute(query).rowcount == 1


def fail(store: Store, job: str, attempt: int, *, code: str, message: str, param: str | None = None) -> bool:
    """End `job` as failed, and say why in its error and an event. Whether it had not ended before."""
    with store.begin() as connection:
        error = {"code": code, "message": message, "param": param}
        if not change(connection, job, to="failed", attempt=attempt, error=error):
            return False
        tell(connection, job, f"The job failed: {message}", level="error", data=error)
        return True
