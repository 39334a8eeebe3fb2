"""Chat and text completions, whole and streamed."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(tags=["chat"])
