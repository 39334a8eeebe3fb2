"""What those who run the service ask it."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(tags=["operations"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """Whether the service answers; the one route that needs no key."""
    return {"status": "ok"}
