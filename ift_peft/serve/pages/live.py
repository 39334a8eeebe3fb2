"""A job's page kept up to date by Server-Sent Events: the parts of it that changed, rendered as the page has them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import select
from starlette.types import Receive, Scope, Send

from ift_peft.serve.errors import not_found
from ift_peft.serve.pages.job_view import (
    SHOWN_EVENTS,
    Curves,
    checkpoints_of,
    events_of,
    scores_of,
    state_of,
)
from ift_peft.serve.pages.streams import Streams
from ift_peft.serve.pages.templates import macro
from ift_peft.serve.security.keys import is_valid
from ift_peft.serve.service import Service, Serving
from ift_peft.serve.store import Record
from ift_peft.serve.store.tables import jobs

router = APIRouter(include_in_schema=False)
EVERY = 1.0  # seconds between two looks into the store
CHECKED_AGAIN = 5.0  # seconds after which who follows is asked for anew: keys are revoked, sessions end
RENDERED_AGAIN = 5.0  # seconds after which the time that is left is told anew
HEARTBEAT = 15.0  # seconds of silence after which a comment says that the stream is alive
PARTS = "job_parts.html.j2"
_NUMBER = re.compile(r"[0-9]{1,18}")


class Followed:
    """One job as its page shows it, read on from where it was last looked at. Not of two threads at once."""

    def __init__(self, service: Service, job_id: str) -> None:
        self.service, self.job_id = service, job_id
        self.curves, self.newest = Curves(), 0
        self.messages: list[Record] = []
        self.job = self._job()
        self._read()

    def _job(self) -> Record:
        found = self.service.store.one(select(jobs).where(jobs.c.id == self.job_id))
        if found is None:
            raise not_found("job", self.job_id, param="fine_tuning_job_id")
        return found

    def _read(self) -> bool:
        new = events_of(self.service, self.job_id, after=self.newest)
        self.curves.add(new)
        self.messages = [*self.messages, *(one for one in new if one["type"] != "metrics")][-SHOWN_EVENTS:]
        self.newest = new[-1]["number"] if new else self.newest
        return bool(new)

    def again(self) -> bool:
        """Read what is new in the store, and whether there is anything. Raises `ApiError` (404) without the job."""
        before, self.job = self.job, self._job()
        new = self._read()  # after the job: what made it final is read with it
        return new or dict(before) != dict(self.job)

    @property
    def final(self) -> bool:
        return state_of(self.job, None).final

    def parts(self) -> dict[str, str]:
        """The changing parts of the page, by the ids of the elements that they fill."""
        state = state_of(self.job, self.curves.newest)
        scores = scores_of(self.service, self.job) if state.status == "succeeded" else None
        return {
            "status": macro(PARTS, "status", state),
            "progress": macro(PARTS, "progress", state),
            "actions": macro(PARTS, "actions", self.job, state),
            "outcome": macro(PARTS, "outcome", self.job, scores),
            "curves": macro(PARTS, "curves", self.curves.charts(), state),
            "scores": macro(PARTS, "scores", scores, state),
            "events": macro(PARTS, "events", self.messages[::-1], SHOWN_EVENTS),
            "checkpoints": macro(PARTS, "checkpoints", checkpoints_of(self.service, self.job_id)),
        }


class Stream(StreamingResponse):
    """A stream that gives its place back, however it ends."""

    def __init__(self, content: AsyncIterator[str], streams: Streams) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams.leave()


@router.get("/jobs/{job_id}/stream")
async def stream(
    request: Request,
    service: Serving,
    job_id: str,
    after: Annotated[int, Query(ge=0)] = 0,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Stream:
    """What changes on a job's page, from the event numbered `Last-Event-ID`, or `after`, on, until it is final.

    Every message holds the parts that are new and has the number of the newest event as its id. Answers 503 where
    there are too many streams.
    """
    known = int(last_event_id) if last_event_id and _NUMBER.fullmatch(last_event_id) else after
    followed = await anyio.to_thread.run_sync(Followed, service, job_id)
    allowed = partial(is_valid, service.store, request.state.caller)
    service.streams.enter()
    return Stream(_messages(followed, known, service.streams, allowed=allowed), service.streams)


async def _messages(
    followed: Followed, known: int, streams: Streams, *, allowed: Callable[[], bool]
) -> AsyncIterator[str]:
    yield "retry: 2000\n\n"
    parts = await anyio.to_thread.run_sync(followed.parts)
    # What events tell is shown already where there is none behind the known one; the job itself may have changed.
    of_events = ("curves", "events") if followed.newest <= known else ()
    new = {name: html for name, html in parts.items() if name not in of_events}
    spoken = rendered = checked = time.monotonic()
    while True:
        if new:
            yield _message(followed, new)
            spoken = time.monotonic()
        elif time.monotonic() - spoken > HEARTBEAT:
            yield ": alive\n\n"
            spoken = time.monotonic()
        if followed.final or streams.closing.is_set():
            return
        await anyio.sleep(EVERY)
        if time.monotonic() - checked > CHECKED_AGAIN:
            if not await anyio.to_thread.run_sync(allowed):
                return
            checked = time.monotonic()
        changed, before = await anyio.to_thread.run_sync(followed.again), parts
        if changed or time.monotonic() - rendered > RENDERED_AGAIN:
            parts = await anyio.to_thread.run_sync(followed.parts)
            rendered = time.monotonic()
        new = {name: html for name, html in parts.items() if html != before[name]}


def _message(followed: Followed, parts: dict[str, str]) -> str:
    content: dict[str, Any] = {"parts": parts, "final": followed.final}
    return f"id: {followed.newest}\nevent: update\ndata: {json.dumps(content, ensure_ascii=False)}\n\n"
