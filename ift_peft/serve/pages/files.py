"""Pages of files: all of them with the form that uploads one, and what one holds."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import or_, select

from ift_peft.serve.errors import ApiError
from ift_peft.serve.files.records import alive, find_file
from ift_peft.serve.pages import actions
from ift_peft.serve.pages.job_view import called
from ift_peft.serve.pages.look import Look
from ift_peft.serve.pages.page import Page, hint_of, page, to
from ift_peft.serve.service import Service, Serving
from ift_peft.serve.store import Record
from ift_peft.serve.store.tables import files, jobs

router = APIRouter(route_class=Page, include_in_schema=False)
ON_A_PAGE = 50
SMALL = 256 * 1024  # bytes of a file that is looked at for the list
LOOKED_AT = 5  # of those files, for one list; the others when they are opened


@router.get("/files")
async def all_files(request: Request, service: Serving, after: Annotated[str | None, Query()] = None) -> Response:
    """Files, the newest first, and what was found in those that were looked at."""
    return await _list(request, service, after)


async def _list(request: Request, service: Service, after: str | None, fault: ApiError | None = None) -> Response:
    found, more = await anyio.to_thread.run_sync(
        lambda: service.store.page(files, alive(), after=after, limit=ON_A_PAGE)
    )
    lines, looked_at = [], 0
    for file in found:
        seen = service.looks.known(file["id"])
        if seen is None and looked_at < LOOKED_AT and file["bytes"] <= SMALL and file["purpose"] == "fine-tune":
            looked_at += 1
            try:
                seen = await _look(service, file)
            except OSError:
                seen = None  # its own page says so
        lines.append({"file": file, "look": seen})
    shown = partial(
        page,
        request,
        "files.html.j2",
        status=200 if fault is None else fault.status,
        lines=lines,
        older=found[-1]["id"] if more else None,
        most=service.settings.limits.upload_bytes,
        fault=fault,
        hint=hint_of(fault.status) if fault else "",
    )
    return await anyio.to_thread.run_sync(shown)


async def _look(service: Service, file: Record) -> Look:
    return await service.looks.look(file["id"], service.settings.files / file["id"], until=file["expires_at"])


@router.post("/files")
async def upload(request: Request, service: Serving) -> Response:
    """Upload a file, and go on to it; or the list again with what is wrong."""
    try:
        file_id = await actions.upload(request)
    except ApiError as fault:
        if fault.status == 401:
            raise
        return await _list(request, service, None, fault)
    return to(f"/files/{file_id}")


@router.get("/files/{file_id}")
async def one_file(request: Request, service: Serving, file_id: str) -> Response:
    """What a file holds, and what is wrong with it."""
    return await _file_page(request, service, file_id)


async def _file_page(request: Request, service: Service, file_id: str, fault: ApiError | None = None) -> Response:
    file = await anyio.to_thread.run_sync(find_file, service.store, file_id)
    seen = None
    if file["purpose"] == "fine-tune":
        try:
            seen = await _look(service, file)
        except OSError:
            await anyio.to_thread.run_sync(find_file, service.store, file_id)  # 404 where it was deleted meanwhile
            raise ApiError(
                500, f"The content of {file['id']} cannot be read. Delete the file, or restore a backup."
            ) from None
    query = (
        select(jobs)
        .where(or_(jobs.c.training_file == file_id, jobs.c.validation_file == file_id))
        .order_by(jobs.c.number.desc())
        .limit(ON_A_PAGE)
    )
    used = await anyio.to_thread.run_sync(service.store.every, query)
    shown = partial(
        page,
        request,
        "file.html.j2",
        status=200 if fault is None else fault.status,
        file=file,
        look=seen,
        used=[(called(job), job) for job in used],
        fault=fault,
        hint=hint_of(fault.status) if fault else "",
    )
    return await anyio.to_thread.run_sync(shown)


@router.post("/files/{file_id}/delete")
async def delete(request: Request, service: Serving, file_id: str) -> Response:
    """Delete a file for good, and back to the list; or the file again with what keeps it."""
    try:
        await actions.delete_file(request, file_id)
    except ApiError as fault:
        if fault.status == 401:
            raise
        return await _file_page(request, service, file_id, fault)
    return to("/files")
