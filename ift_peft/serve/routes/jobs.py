"""Fine-tuning jobs, their events and checkpoints."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(tags=["jobs"])
