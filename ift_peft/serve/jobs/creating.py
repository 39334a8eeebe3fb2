"""A fine-tuning job made of a request: its base, its files kept for it, its recipe, its record."""

from __future__ import annotations

import secrets
from pathlib import Path

from sqlalchemy import Connection, null, select

from ift_peft.errors import IftPeftError
from ift_peft.serve.errors import ApiError, as_api_error
from ift_peft.serve.files.records import alive
from ift_peft.serve.ids import new_id
from ift_peft.serve.jobs.body import CreateJob, hyperparameters_of, suffix_of
from ift_peft.serve.jobs.folder import JobFolder
from ift_peft.serve.jobs.recipes import plan
from ift_peft.serve.jobs.records import ACTIVE, job_record, now, tell
from ift_peft.serve.jobs.repeated import Asked
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Record, Store
from ift_peft.serve.store.tables import files, jobs, metadata_pairs, models


def make_job(settings: Settings, store: Store, body: CreateJob, asked: Asked) -> Record:
    """The record of a new job, its files kept for it. Raises `ApiError`, and leaves nothing then."""
    given, suffix = hyperparameters_of(body), suffix_of(body)
    base = _base(settings, store, body.model)
    job, seed = new_id("ftjob"), secrets.randbelow(2**31) if body.seed is None else body.seed
    folder = JobFolder(settings.jobs / job)
    try:
        rows = _take(settings, store, body.training_file, folder, folder.training, param="training_file")
        if body.validation_file is not None:
            _take(settings, store, body.validation_file, folder, folder.validation, param="validation_file")
        try:
            planned = plan(
                name=job,
                base=settings.bases[base],
                device=settings.device,
                seed=seed,
                given=given,
                above=body.recipe or {},
                rows=rows,
                tested=body.validation_file is not None,
            )
        except IftPeftError as error:
            raise as_api_error(error, param="recipe") from None
        with store.begin() as connection:
            _still_there(connection, body)
            waits = connection.execute(select(jobs.c.id).where(jobs.c.status.in_(ACTIVE))).first() is not None
            connection.execute(
                jobs.insert().values(
                    id=job,
                    created_at=now(),
                    status="queued" if waits else "validating_files",
                    attempt=0,
                    priority=body.priority,
                    model=body.model,
                    base=base,
                    recipe=planned.values,
                    hyperparameters=given.model_dump(),
                    resolved=planned.hyperparameters.model_dump(),
                    suffix=suffix or None,
                    seed=seed,
                    metadata=null() if body.metadata is None else body.metadata,
                    training_file=body.training_file,
                    validation_file=body.validation_file,
                    result_files=[],
                    error=null(),
                    request=asked.request,
                    body=asked.content,
                )
            )
            for key, value in (body.metadata or {}).items():
                connection.execute(metadata_pairs.insert().values(job=job, key=key, value=value))
            _tell_created(connection, job, body, waits=waits)
    except BaseException:
        folder.clear()
        raise
    return job_record(store, job)


def _tell_created(connection: Connection, job: str, body: CreateJob, *, waits: bool) -> None:
    tell(connection, job, f"Created fine-tuning job: {job}")
    if waits:
        tell(connection, job, "Waiting for the jobs before it; its files are validated when its turn comes")
    tell(connection, job, f"Validating training file: {body.training_file}")
    if body.validation_file is None:
        held_out = "No validation file: a share of the training rows is held out, and measured before and after"
        tell(connection, job, held_out, level="warn")
    else:
        tell(connection, job, f"Validating validation file: {body.validation_file}")


def _base(settings: Settings, store: Store, model: str) -> str:
    """The public name of an allowed base. Raises `ApiError` for any other model."""
    if model in settings.bases:
        return model
    if store.one(select(models.c.id).where(models.c.name == model)) is not None:
        raise ApiError(
            400,
            f"{model!r} is a tuned model; a job begins from a base ({', '.join(settings.bases)}). "
            "Train on the rows of both jobs together instead.",
            code="model_not_available",
            param="model",
        )
    raise ApiError(
        400,
        f"The model {model!r} is not one of those that can be fine-tuned: {', '.join(settings.bases)}.",
        code="model_not_available",
        param="model",
    )


def _take(settings: Settings, store: Store, file: str, folder: JobFolder, target: Path, *, param: str) -> int:
    """Keep an uploaded file for the job; how many rows it has. Raises `ApiError` where it cannot be used."""
    found = store.one(select(files).where(files.c.id == file, alive()))
    if found is None:
        raise _no_file(file, param)
    if found["purpose"] != "fine-tune":
        message = f"The purpose of {file!r} is {found['purpose']!r}, not 'fine-tune'."
        raise ApiError(400, message, code=f"invalid_{param}", param=param)
    try:
        folder.take(settings.files / found["id"], target)
    except FileNotFoundError:
        raise _no_file(file, param) from None
    if found["rows"] is not None:
        return int(found["rows"])
    with target.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _still_there(connection: Connection, body: CreateJob) -> None:
    """A file that was deleted while the job was made was deleted before it. Raises `ApiError`."""
    for param, file in (("training_file", body.training_file), ("validation_file", body.validation_file)):
        query = select(files.c.id).where(files.c.id == file, alive()).with_for_update(read=True)
        if file is not None and connection.execute(query).first() is None:
            raise _no_file(file, param)


def _no_file(file: str, param: str) -> ApiError:
    return ApiError(400, f"No such file: {file!r}.", code=f"invalid_{param}", param=param)
