"""Figures for Prometheus, in a registry of the service's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from ift_peft.serve.objects import Status
from ift_peft.serve.store.tables import files, jobs

if TYPE_CHECKING:
    from ift_peft.serve.service import Service

STATUSES: tuple[str, ...] = Status.__args__  # type: ignore[attr-defined]
BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counted as it happens (`requests`, `seconds`, `uploaded`), or looked up when asked for."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ift_http_requests",
            "Requests by route, method and status.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "ift_http_request_seconds",
            "Time until the last byte of an answer.",
            ("route", "method"),
            buckets=BUCKETS,
            registry=self.registry,
        )
        self.uploaded = Counter("ift_upload_bytes", "Bytes of uploads received.", registry=self.registry)
        self.registry.register(_Looked(service))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _Looked(Collector):
    """What the store and the engines say at the moment."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._process = psutil.Process()

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        counted = select(jobs.c.status, func.count().label("n")).group_by(jobs.c.status)
        found = {record["status"]: record["n"] for record in self.service.store.every(counted)}
        by_status = GaugeMetricFamily("ift_jobs", "Fine-tuning jobs by status.", labels=("status",))
        for status in STATUSES:
            by_status.add_metric((status,), found.get(status, 0))
        yield by_status
        yield GaugeMetricFamily("ift_queue_length", "Jobs that wait for a trainer.", found.get("queued", 0))
        kept = select(func.count().label("n"), func.coalesce(func.sum(files.c.bytes), 0).label("bytes"))
        record = self.service.store.every(kept)[0]
        yield GaugeMetricFamily("ift_files", "Files that are kept.", record["n"])
        yield GaugeMetricFamily("ift_files_bytes", "Bytes of the files that are kept.", record["bytes"])
        yield GaugeMetricFamily("ift_resident_bytes", "Resident memory.", self._process.memory_info().rss)
        yield from _engines(getattr(self.service, "models", None))


def _engines(models: Any) -> Iterator[Metric]:
    """Rows of the engines, where the models that are loaded tell them (`rows()`: running, waiting)."""
    rows = getattr(models, "rows", None)
    if rows is None:
        return
    running, waiting = rows()
    yield GaugeMetricFamily("ift_engine_rows_running", "Rows of chats that are being generated.", running)
    yield GaugeMetricFamily("ift_engine_rows_waiting", "Rows of chats that wait for a place.", waiting)
