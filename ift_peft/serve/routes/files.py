"""Files: upload, list, get, content, delete."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Annotated, Any, Literal
from urllib.parse import quote

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from ift_peft.serve.errors import ApiError, not_found
from ift_peft.serve.files.records import alive, as_file, delete_file, find_file, keep_file
from ift_peft.serve.files.upload import PURPOSE, Upload
from ift_peft.serve.objects import ErrorBody, File, FileDeleted, Page, page_of
from ift_peft.serve.service import Service, Serving
from ift_peft.serve.store import Record
from ift_peft.serve.store.tables import files

router = APIRouter(tags=["files"])
PIECE = 1 << 16
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "JSON lines in UTF-8."},
                        "purpose": {"type": "string", "enum": [PURPOSE]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    }
}


@router.post("/files", response_model=File, openapi_extra=FORM, responses={507: {"model": ErrorBody}})
async def create_file(request: Request, service: Serving) -> File:
    """Keep a file of rows to train on, checked line by line; all faults are told at once."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(400, "Send the file as it is, not compressed.", code="invalid_value", param="file")
    limits = service.settings.limits
    run = anyio.to_thread.run_sync
    with await run(Upload, service.settings.files, request.headers.get("content-type", ""), limits) as upload:
        async for piece in request.stream():
            if piece:
                await run(upload.write, piece)
                service.metrics.uploaded.inc(len(piece))
        return as_file(await run(_kept, service, upload))


def _kept(service: Service, upload: Upload) -> Record:
    upload.finish()
    return keep_file(
        service.settings,
        service.store,
        upload.path,
        filename=upload.filename or "file",
        purpose=PURPOSE,
        sha256=upload.sha256,
        rows=upload.checker.rows,
        seconds=upload.seconds,
    )


@router.get("/files", response_model=Page[File])
def list_files(
    service: Serving,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Page[File]:
    """The files there are, the newest first."""
    conditions = [alive(), *([files.c.purpose == purpose] if purpose is not None else [])]
    records, more = service.store.page(files, *conditions, after=after, limit=limit, ascending=order == "asc")
    return page_of([as_file(record) for record in records], more)


@router.get("/files/{file_id}", response_model=File)
def get_file(file_id: str, service: Serving) -> File:
    """One file."""
    return as_file(find_file(service.store, file_id))


@router.get(
    "/files/{file_id}/content",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/octet-stream": {}}}},
)
def get_content(file_id: str, service: Serving) -> StreamingResponse:
    """What a file holds, byte for byte."""
    record = find_file(service.store, file_id)
    try:
        file = (service.settings.files / record["id"]).open("rb")
    except FileNotFoundError:  # deleted since
        raise not_found("file", file_id, param="file_id") from None
    headers = {
        "Content-Length": str(record["bytes"]),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(record['filename'], safe='')}",
    }
    return StreamingResponse(_pieces(file), media_type="application/octet-stream", headers=headers)


@router.delete("/files/{file_id}", response_model=FileDeleted)
def remove_file(file_id: str, service: Serving) -> FileDeleted:
    """Delete a file, and the rows that finished runs have copied from it."""
    delete_file(service.settings, service.store, file_id)
    service.looks.forget(file_id)
    return FileDeleted(id=file_id)


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while piece := file.read(PIECE):
            yield piece
