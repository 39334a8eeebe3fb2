"""The files that pages load."""

from __future__ import annotations

from fastapi import APIRouter, Response

from ift_peft.serve.errors import not_found
from ift_peft.serve.pages.templates import ASSETS, asset

router = APIRouter(include_in_schema=False)


@router.get("/static/{name}")
def static(name: str, v: str = "") -> Response:
    """A stylesheet, script or image of the pages; kept for good by browsers that asked for this very content."""
    if name not in ASSETS:
        raise not_found("file", name, param="name")
    content, media_type, version = asset(name)
    kept = "public, max-age=31536000, immutable" if v == version else "no-cache"
    return Response(content, media_type=media_type, headers={"Cache-Control": kept})
