"""Pages of jobs: all of them, one of them, the form that starts one."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import func, select

from ift_peft.serve.errors import ApiError, not_found
from ift_peft.serve.files.records import alive
from ift_peft.serve.pages import actions
from ift_peft.serve.pages.job_view import called, newest_metrics, run_of, scores_of, state_of
from ift_peft.serve.pages.live import Followed
from ift_peft.serve.pages.page import Page, hint_of, page, to
from ift_peft.serve.service import Service, Serving
from ift_peft.serve.store import Record
from ift_peft.serve.store.tables import files, jobs, models

router = APIRouter(route_class=Page, include_in_schema=False)
ON_A_PAGE = 50
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
FIELDS = {  # of the form, and what the API calls them
    "model": "model",
    "training_file": "training_file",
    "validation_file": "validation_file",
    "suffix": "suffix",
    "seed": "seed",
    "n_epochs": "method.supervised.hyperparameters.n_epochs",
    "batch_size": "method.supervised.hyperparameters.batch_size",
    "learning_rate_multiplier": "method.supervised.hyperparameters.learning_rate_multiplier",
    "r": "recipe.adapter.r",
}
NUMBERS = ("seed", "n_epochs", "batch_size", "learning_rate_multiplier", "r")


@router.get("/")
def overview(request: Request, service: Serving, after: Annotated[str | None, Query()] = None) -> Response:
    """Jobs, the newest first; on the first page also the models that are served and how many files there are."""
    found, more = service.store.page(jobs, after=after, limit=ON_A_PAGE)
    newest = newest_metrics(service, [job["id"] for job in found])
    lines = [
        {
            "job": job,
            "name": called(job),
            "state": state_of(job, newest.get(job["id"])),
            "scores": scores_of(service, job) if job["status"] == "succeeded" else None,
        }
        for job in found
    ]
    tuned = service.store.every(select(models).where(models.c.step.is_(None)).order_by(models.c.number.desc()))
    count = service.store.every(select(func.count().label("files")).select_from(files).where(alive()))[0]["files"]
    return page(
        request,
        "overview.html.j2",
        lines=lines,
        older=found[-1]["id"] if more else None,
        first=after is None,
        tuned=tuned,
        bases=sorted(service.settings.bases),
        files=count,
    )


@router.get("/jobs/{job_id}")
def one_job(request: Request, service: Serving, job_id: str) -> Response:
    """Everything about a job; the parts that change are filled as the stream fills them."""
    return _job_page(request, service, job_id)


def _job_page(request: Request, service: Service, job_id: str, fault: ApiError | None = None) -> Response:
    followed = Followed(service, job_id)
    job, run = followed.job, run_of(service, followed.job)
    named = {one: _filename(service, one) for one in (job["training_file"], job["validation_file"]) if one}
    return page(
        request,
        "job.html.j2",
        status=200 if fault is None else fault.status,
        job=job,
        name=called(job),
        state=state_of(job, followed.curves.newest),
        parts=followed.parts(),
        newest=followed.newest,
        filenames=named,
        settings=_settings(job),
        has_report=run is not None and (run.path / "report.html").is_file(),
        fault=fault,
        hint=hint_of(fault.status) if fault else "",
    )


def _settings(job: Record) -> list[tuple[str, str]]:
    """Hyperparameters, and the sections of the recipe that training followed, setting by setting."""
    shown = []
    for name, value in job["resolved"].items():
        drawn = " (auto)" if job["hyperparameters"].get(name) == "auto" != value else ""
        shown.append((name, f"{_said(value)}{drawn}"))
    recipe = job["recipe"] if isinstance(job["recipe"], Mapping) else {}
    for name in ("base", "adapter", "training"):
        section = recipe.get(name)
        if isinstance(section, Mapping) and section:
            shown.append((name, ", ".join(f"{key} {_said(value)}" for key, value in section.items() if key != "model")))
    return [(name, told) for name, told in shown if told]


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _filename(service: Service, file_id: str) -> str | None:
    """The name of a file, None where it has been deleted."""
    found = service.store.one(select(files.c.filename).where(files.c.id == file_id, alive()))
    return None if found is None else str(found["filename"])


@router.get("/jobs/{job_id}/report")
def report(service: Serving, job_id: str) -> Response:
    """The report of the job's run, in a sandbox: it is made of rows, and may run and load nothing."""
    job = service.store.one(select(jobs).where(jobs.c.id == job_id))
    run = None if job is None else run_of(service, job)
    path = None if run is None else run.path / "report.html"
    if path is None or not path.is_file():
        raise not_found("report of job", job_id, param="fine_tuning_job_id")
    return Response(path.read_bytes(), media_type="text/html", headers={"Content-Security-Policy": REPORT_POLICY})


@router.post("/jobs/{job_id}/{action}")
async def act(request: Request, service: Serving, job_id: str, action: str) -> Response:
    """Cancel, pause or resume, and back to the job, which tells what was refused."""
    if action not in ("cancel", "pause", "resume"):
        raise not_found("action", action, param="action")
    try:
        await actions.act_on_job(request, job_id, action)
    except ApiError as fault:
        if fault.status == 401:
            raise
        told = fault
        return await anyio.to_thread.run_sync(lambda: _job_page(request, service, job_id, told))
    return to(f"/jobs/{job_id}")


@router.get("/start")
def start(request: Request, service: Serving, training_file: str = "", model: str = "") -> Response:
    """The form, with what the link to it chose."""
    return _form(request, service, {"training_file": training_file, "model": model})


@router.post("/start")
async def started(request: Request, service: Serving) -> Response:
    """Create the job that the form asks for, and go on to it; or the form again with what is wrong."""
    async with request.form(max_files=0, max_fields=20) as form:
        given = {name: str(form.get(name, "")).strip() for name in (*FIELDS, "once")}
    try:
        job_id = await actions.create_job(request, wanted(given), once=given["once"] or secrets.token_hex(16))
    except ApiError as fault:
        if fault.status == 401:
            raise
        told = fault
        return await anyio.to_thread.run_sync(lambda: _form(request, service, given, told))
    return to(f"/jobs/{job_id}")


def wanted(given: Mapping[str, str]) -> dict[str, Any]:
    """The body of a create from the fields of the form; what is left empty is left to the service."""
    body: dict[str, Any] = {}
    for name, path in FIELDS.items():
        if given.get(name):
            *above, last = path.split(".")
            inner = body
            for key in above:
                inner = inner.setdefault(key, {})
            inner[last] = _number(given[name]) if name in NUMBERS else given[name]
    if "method" in body:
        body["method"]["type"] = "supervised"
    return body


def _number(text: str) -> int | float | str:
    """The number that a field holds; what is none goes as it is to the API, which says what it expects there."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _form(request: Request, service: Service, given: Mapping[str, str], fault: ApiError | None = None) -> Response:
    rows = service.store.every(
        select(files).where(files.c.purpose == "fine-tune", alive()).order_by(files.c.number.desc())
    )
    kept = given.get("once") if fault is None or fault.status >= 500 else None  # what was refused made no job
    at = (fault.param or "").split(".")[-1] if fault else ""
    return page(
        request,
        "start.html.j2",
        status=200 if fault is None else fault.status,
        given={**dict.fromkeys(FIELDS, ""), **given},
        once=kept or secrets.token_hex(16),
        files=rows,
        bases=sorted(service.settings.bases),
        fault=fault,
        at=at if at in FIELDS else "",
        hint=hint_of(fault.status) if fault else "",
    )
