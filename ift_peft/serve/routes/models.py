"""Models: the bases, tuned models and their checkpoints."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(tags=["models"])
