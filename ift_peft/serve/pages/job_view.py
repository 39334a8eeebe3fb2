"""What the pages say of a job, as plain values read from the store and from the folder of its run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from ift_peft.errors import IftPeftError
from ift_peft.report.figures import LineChart, Strip, line_chart, strips
from ift_peft.report.scores import Comparison, Verdict, comparisons, verdict
from ift_peft.run_dir import RunDir
from ift_peft.serve.objects import FINAL
from ift_peft.serve.pages.templates import lasting
from ift_peft.serve.service import Service
from ift_peft.serve.store import Record
from ift_peft.serve.store.tables import events, models

CURVES = {  # numbers of a metrics event, and what their chart is called
    "train_loss": "training loss",
    "train_mean_token_accuracy": "training accuracy",
    "valid_loss": "validation loss",
    "valid_mean_token_accuracy": "validation accuracy",
}
SHOWN_EVENTS = 100
ACTIONS = {  # what may be done to a job in each state
    "validating_files": ("pause", "cancel"),
    "queued": ("pause", "cancel"),
    "running": ("pause", "cancel"),
    "paused": ("resume", "cancel"),
}
TONES = {"succeeded": "good", "failed": "bad", "cancelled": "bad", "running": "busy", "validating_files": "busy"}


@dataclass(frozen=True)
class State:
    """Where a job stands: its status as the API has it, the words for it, and what is known of how far it is."""

    status: str
    words: str
    tone: str
    progress: str
    share: float | None
    """Of the steps that are done, between 0 and 1."""
    actions: tuple[str, ...]

    @property
    def final(self) -> bool:
        return self.status in FINAL


@dataclass(frozen=True)
class Scores:
    """Base and adapter of one run on held-out rows."""

    verdict: Verdict | None
    found: tuple[Comparison, ...]
    strips: list[Strip]
    rows: int
    intervals: str


def state_of(job: Record, newest: Mapping[str, Any] | None) -> State:
    """The state of a job whose newest metrics event has the data `newest`."""
    status = str(job["status"])
    told, share = [], None
    step, steps = (newest or {}).get("step"), (newest or {}).get("total_steps")
    if isinstance(step, int | float) and status != "succeeded":
        told.append(f"step {step:,.0f}" + (f" of {steps:,.0f}" if isinstance(steps, int | float) else ""))
        share = min(1.0, step / steps) if isinstance(steps, int | float) and steps > 0 else None
    if job["estimated_finish"] and status == "running":
        left = job["estimated_finish"] - time.time()
        told.append(f"about {lasting(left)} left" if left > 0 else "nearly done")
    if job["finished_at"] and job["started_at"]:
        told.append(f"took {lasting(job['finished_at'] - job['started_at'])}")
    words, tone = status.replace("_", " "), TONES.get(status, "idle")
    return State(status, words, tone, ", ".join(told), share, ACTIONS.get(status, ()))


def newest_metrics(service: Service, job_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The data of the newest metrics event of each job that has one."""
    newest = (
        select(func.max(events.c.number))
        .where(events.c.job.in_(list(job_ids)), events.c.type == "metrics")
        .group_by(events.c.job)
    )
    found = service.store.every(select(events.c.job, events.c.data).where(events.c.number.in_(newest)))
    return {str(one["job"]): dict(one["data"] or {}) for one in found}


def called(job: Record) -> str:
    """What people call a job: the suffix that it was given, or the end of its id."""
    return str(job["suffix"] or f"…{job['id'][-8:]}")


class Curves:
    """Points over steps, grown event by event. A step that was trained again has the newer value."""

    def __init__(self) -> None:
        self.points: dict[str, dict[float, float]] = {name: {} for name in CURVES}
        self.newest: dict[str, Any] | None = None

    def add(self, found: Sequence[Record]) -> None:
        """Take in metrics events, in their order."""
        for one in found:
            data = one["data"] if one["type"] == "metrics" else None
            step = _finite((data or {}).get("step"))
            if data is None or step is None:
                continue
            self.newest = dict(data)
            for name, points in self.points.items():
                value = _finite(data.get(name))
                if value is not None:
                    points[step] = value

    def charts(self) -> list[LineChart]:
        return [_chart(CURVES[name], points) for name, points in self.points.items() if points]


def _chart(name: str, points: Mapping[float, float]) -> LineChart:
    chart = line_chart(name, sorted(points.items()))
    # Of a loss the lowest value is worth telling, of an accuracy it is not.
    return replace(chart, alternative=chart.alternative.split(", lowest")[0]) if "accuracy" in name else chart


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def events_of(service: Service, job_id: str, *, after: int = 0) -> list[Record]:
    """The events of a job, oldest first, behind the one numbered `after`."""
    query = select(events).where(events.c.job == job_id, events.c.number > after)
    return service.store.every(query.order_by(events.c.number))


def checkpoints_of(service: Service, job_id: str) -> list[Record]:
    """The checkpoints of a job that can be asked, the newest first."""
    query = select(models).where(models.c.job == job_id, models.c.step.is_not(None))
    return service.store.every(query.order_by(models.c.number.desc()))


def run_of(service: Service, job: Record) -> RunDir | None:
    """The run folder of a job, None where there is none below the data folder."""
    if not job["run"]:
        return None
    root = service.settings.data_dir.resolve()
    path = (root / job["run"]).resolve()
    return RunDir(path) if root in path.parents and (path / "manifest.json").is_file() else None


def scores_of(service: Service, job: Record) -> Scores | None:
    """Before and after, None for a run that was not measured or whose scores cannot be read."""
    run = run_of(service, job)
    path = None if run is None else run.path / "scores.json"
    if path is None or not path.is_file():
        return None
    return _scores(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _scores(path: Path, changed: int) -> Scores | None:
    run = RunDir(path.parent)
    try:
        content, recipe = run.read(path.name), run.recipe()
    except IftPeftError:
        return None
    found = comparisons(content)
    told = verdict(recipe, content)
    return Scores(told, found, strips(found), int(content.get("rows") or 0), str(content.get("intervals", "")))
