"""The models that the service has, by name: bases of its settings, and what jobs made."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import delete, or_, select

import ift_peft
from ift_peft.serve.errors import ApiError, not_found
from ift_peft.serve.objects import FINAL
from ift_peft.serve.objects import Model as ModelObject
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Record, Store
from ift_peft.serve.store.tables import jobs, models

DELETED = ".deleted-"  # a folder that is on its way out; the id of its model follows


@dataclass(frozen=True)
class Named:
    """A name with what the store has for it; None: a base."""

    name: str
    record: Record | None


def find(name: str, settings: Settings, store: Store) -> Named:
    """Raises `ApiError` (404) for a name that is none."""
    if name in settings.bases:
        return Named(name, None)
    record = store.one(select(models).where(models.c.name == name))
    if record is None:
        raise not_found("model", name, param="model", code="model_not_found")
    return Named(name, record)


def every(settings: Settings, store: Store) -> list[ModelObject]:
    """Bases first, then tuned models and checkpoints, the oldest first."""
    found = [Named(name, None) for name in settings.bases]
    found += [Named(row["name"], row) for row in store.every(select(models).order_by(models.c.number))]
    return [as_object(one, settings) for one in found]


def as_object(named: Named, settings: Settings) -> ModelObject:
    if named.record is None:
        return ModelObject(id=named.name, created=_made(settings.bases[named.name]), owned_by="system")
    return ModelObject(id=named.name, created=named.record["created_at"], owned_by=settings.organization)


def _made(base: str) -> int:
    """When a base's configuration was written, as far as this machine has it in a folder; else 0."""
    folder = Path(ift_peft.__file__).parent / "model" / "tiny" if base == "tiny" else Path(base).expanduser()
    config = folder / "config.json"
    return int(config.stat().st_mtime) if config.is_file() else 0


def remove(named: Named, settings: Settings, store: Store) -> list[str]:
    """Delete a tuned model with its checkpoints, or one checkpoint: records and files. The names that are gone.

    Raises `ApiError`: 403 for a base, 400 where a job is going on from it.
    """
    record = named.record
    if record is None:
        raise ApiError(403, "A base cannot be deleted.", code="model_not_deletable", param="model")
    gone = [record["name"], *(_checkpoints_of(record, store) if record["step"] is None else ())]
    with store.read() as connection:
        begun = jobs.c.model.in_(gone) & jobs.c.status.not_in(FINAL)
        of_its_job = (jobs.c.id == record["job"]) & jobs.c.status.not_in(FINAL)
        busy = connection.execute(select(jobs.c.id).where(or_(begun, of_its_job))).scalar()
    if busy is not None:
        raise ApiError(400, f"The job {busy} is at work with this model.", code="model_in_use", param="model")
    folder = _folder(record, settings)
    if folder.is_dir():
        folder.rename(settings.runs / f"{DELETED}{record['id']}")
    _finish(record["id"], settings, store)
    return gone


def finish_removals(settings: Settings, store: Store) -> None:
    """Go on with what was being deleted when the service ended."""
    for folder in settings.runs.glob(f"{DELETED}*"):
        _finish(folder.name.removeprefix(DELETED), settings, store)


def _finish(id_: str, settings: Settings, store: Store) -> None:
    """Records first, then files: what the store still names is there, or was renamed and is found at a start."""
    with store.begin() as connection:
        record = connection.execute(select(models).where(models.c.id == id_)).mappings().first()
        if record is not None:
            whole = record["step"] is None
            connection.execute(delete(models).where(models.c.job == record["job"] if whole else models.c.id == id_))
    for folder in (settings.data_dir / "cache" / "vllm" / id_, settings.runs / f"{DELETED}{id_}"):
        if folder.is_dir():
            shutil.rmtree(folder)


def _checkpoints_of(record: Record, store: Store) -> list[str]:
    of_job = (models.c.job == record["job"]) & (models.c.id != record["id"])
    return [str(row["name"]) for row in store.every(select(models.c.name).where(of_job))]


def _folder(record: Record, settings: Settings) -> Path:
    """What a model's deletion removes: all runs of its job, or the checkpoint's own folder.

    Raises `ApiError` (500) where the store names a place that is no run's.
    """
    of_job = settings.runs / str(record["job"])
    run = settings.data_dir / str(record["run"])
    if record["step"] is not None:
        folder = settings.data_dir / str(record["adapter"])
    else:
        folder = of_job if run.is_relative_to(of_job) else run
    if settings.runs.resolve() not in folder.resolve().parents:
        raise ApiError(500, "This model lies outside of the service's runs.", code="internal_error")
    return folder
