"""Requests for jobs that were sent before: known by a key of the caller's, or by the count that clients send along."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from ift_peft.serve.errors import ApiError
from ift_peft.serve.jobs.body import CreateJob
from ift_peft.serve.jobs.records import now
from ift_peft.serve.store import Record, Store
from ift_peft.serve.store.tables import jobs

RETRIED_SECONDS = 30 * 60  # after which an equal request is a new one, also where it says that it is repeated


@dataclass(frozen=True)
class Caller:
    """Who asks, and what says that they may have asked before."""

    authorization: str = ""
    retries: int = 0
    """How often the client has sent this request before, by its own count."""
    idempotency_key: str | None = None


@dataclass(frozen=True)
class Asked:
    """A request for a job, as it is known again by `request`.

    With a key of the caller's, `content` is the hash of its body; without one `request` says that, and it is None.
    """

    caller: Caller
    request: str
    content: str | None

    @classmethod
    def of(cls, body: CreateJob, caller: Caller) -> Asked:
        """Raises `ApiError` for a body that JSON or UTF-8 does not have."""
        written, key = _written(body), caller.idempotency_key
        keyed = key is not None
        request = _hash(caller.authorization, key if keyed else written, str(keyed))
        return cls(caller, request, _hash(written) if keyed else None)

    def made_before(self, store: Store) -> Record | None:
        """The job that was made of this request; one without a key must say that it is repeated, and be recent.

        Raises `ApiError` (400) where its key came with another body.
        """
        if self.content is None and self.caller.retries < 1:
            return None
        query = select(jobs).where(jobs.c.request == self.request).order_by(jobs.c.number.desc())
        if self.content is None:
            query = query.where(jobs.c.created_at >= now() - RETRIED_SECONDS)
        found = store.one(query)
        if found is not None and found["body"] not in (None, self.content):
            raise ApiError(
                400, "This Idempotency-Key was used for another request.", code="idempotency_key_reused", param=None
            )
        return found


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
