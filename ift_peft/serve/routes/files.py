"""Files: upload, list, get, content, delete."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(tags=["files"])
