"""Fine-tuning jobs, their events and checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from sqlalchemy import null, select

from ift_peft.serve.errors import ApiError
from ift_peft.serve.jobs.body import CreateJob
from ift_peft.serve.jobs.records import checkpoint_object, event_object, job_object, job_record
from ift_peft.serve.jobs.repeated import Caller
from ift_peft.serve.objects import Job, JobCheckpoint, JobEvent, Page, page_of
from ift_peft.serve.service import Service, Serving
from ift_peft.serve.store import Record
from ift_peft.serve.store.tables import events, jobs, metadata_pairs, models

router = APIRouter(tags=["jobs"], prefix="/fine_tuning/jobs")

After = Annotated[str | None, Query(description="The id of the last object of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100)]


def _caller(
    request: Request,
    x_stainless_retry_count: Annotated[str | None, Header()] = None,
    idempotency_key: Annotated[str | None, Header(max_length=256)] = None,
) -> Caller:
    count = x_stainless_retry_count or "0"
    retries = int(count) if count.isascii() and count.isdigit() and len(count) < 4 else 0
    return Caller(request.headers.get("authorization", ""), retries, idempotency_key)


Calling = Annotated[Caller, Depends(_caller)]


@router.post("")
def create(body: CreateJob, service: Serving, caller: Calling) -> Job:
    """Make a job, which begins when those before it have ended."""
    return _shown(service, service.jobs.create(body, caller))


@router.get("")
def list_jobs(request: Request, service: Serving, after: After = None, limit: Limit = 20) -> Page[Job]:
    """Jobs, the newest first; `metadata[key]=value` for those that have it, `metadata=null` for those without any."""
    records, more = service.store.page(jobs, *_metadata(request), after=after, limit=limit)
    return page_of([_shown(service, record) for record in records], more)


@router.get("/{job}")
def retrieve(job: str, service: Serving) -> Job:
    return _shown(service, job_record(service.store, job))


@router.post("/{job}/cancel")
def cancel(job: str, service: Serving, caller: Calling) -> Job:
    """End a job now; the checkpoints that it has stay."""
    return _shown(service, service.jobs.cancel(job, caller))


@router.post("/{job}/pause")
def pause(job: str, service: Serving, caller: Calling) -> Job:
    """Let a job rest at a checkpoint; the next one begins."""
    return _shown(service, service.jobs.pause(job, caller))


@router.post("/{job}/resume")
def resume(job: str, service: Serving, caller: Calling) -> Job:
    """Queue a paused job again; it goes on at its checkpoint, to what it would have become without the pause."""
    return _shown(service, service.jobs.resume(job, caller))


@router.get("/{job}/events")
def list_events(job: str, service: Serving, after: After = None, limit: Limit = 20) -> Page[JobEvent]:
    """What happened to a job, the newest first."""
    job_record(service.store, job)
    records, more = service.store.page(events, events.c.job == job, after=after, limit=limit)
    return page_of([event_object(record) for record in records], more)


@router.get("/{job}/checkpoints")
def list_checkpoints(job: str, service: Serving, after: After = None, limit: Limit = 10) -> Page[JobCheckpoint]:
    """The checkpoints of a job that can be used as models, the newest first."""
    job_record(service.store, job)
    conditions: tuple[Any, ...] = (models.c.job == job, models.c.step.is_not(None))
    records, more = service.store.page(models, *conditions, after=after, limit=limit)
    return page_of([checkpoint_object(record) for record in records], more)


def _shown(service: Service, record: Record) -> Job:
    return job_object(record, organization=service.settings.organization)


def _metadata(request: Request) -> list[Any]:
    """The conditions of `metadata[key]=value` and `metadata=null` in a query. Raises `ApiError` for other forms."""
    conditions: list[Any] = []
    for name, value in request.query_params.multi_items():
        if name != "metadata" and not name.startswith("metadata["):
            continue
        pair = re.fullmatch(r"metadata\[(.*)\]", name, re.DOTALL)
        if pair is not None:
            pairs = metadata_pairs.c
            conditions.append(jobs.c.id.in_(select(pairs.job).where(pairs.key == pair[1], pairs.value == value)))
        elif name == "metadata" and value == "null":
            conditions.append(jobs.c.metadata.is_(null()))
        else:
            raise ApiError(
                400, "metadata: either metadata[key]=value or metadata=null", code="invalid_value", param="metadata"
            )
    if len(conditions) > 1 and any(name == "metadata" for name in request.query_params):
        raise ApiError(
            400, "metadata=null does not go with metadata[key]=value", code="invalid_value", param="metadata"
        )
    return conditions
