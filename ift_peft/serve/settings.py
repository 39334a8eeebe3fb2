"""What a service is started with. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one client may ask for. Sizes are in bytes, times in seconds."""

    upload_bytes: int = 512 * MEBIBYTE
    line_bytes: int = MEBIBYTE
    rows: int = 1_000_000
    depth: int = 16
    min_examples: int = 10
    body_bytes: int = 4 * MEBIBYTE
    """Of every request that is no upload."""
    body_seconds: float = 30.0
    """In which a body may come as slowly as it likes; after them it has come at 1 KiB a second, or is refused. In which
    the head of a request is whole, or its connection closed."""
    sweep_seconds: float = 60.0
    """Between two looks for what has expired."""
    requests_per_minute: int = 600
    """Of one key, or of one address where no key is needed; of one address also without a key that is valid."""
    waiting_requests: int = 128
    """Chats that wait for a row of the engine; those that come then are told to come back."""
    rows_together: int = 16
    """Rows of one batch of the engine."""
    adapters: int = 32
    """Adapters that are loaded at once on one base."""
    bases: int = 4
    """Bases that are loaded at once and shared, each in one way (quantisation, compute type, revision)."""
    whole_models: int = 2
    """Models that are loaded at once with a base of their own, as their adapters cannot share one (DoRA, …)."""
    request_seconds: float = 600.0
    max_completion_tokens: int = 4096
    prompt_characters: int = 1_000_000
    """Of one prompt. A longer one is refused before it is made tokens of, which takes a core seconds."""
    choices: int = 8
    """The most that `n` may be."""
    streams: int = 64
    """Pages of the dashboard that follow a job at once."""


@dataclass(frozen=True)
class Settings:
    """A service: where it listens, where it keeps what it was given, and which bases it trains and serves."""

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 8000
    store_url: str | None = None
    """A database for jobs and records, as SQLAlchemy writes it; without one, SQLite below `data_dir`."""
    bases: dict[str, str] = field(default_factory=lambda: {"tiny": "tiny"})
    """Public name of each base that is allowed, and what a recipe's `base.model` says for it."""
    limits: Limits = Limits()
    require_key: bool = False
    """Not to start without a key, also where only this machine reaches the service: as behind a proxy."""
    allowed_hosts: tuple[str, ...] = ()
    """Names, beside loopback and `host`, by which clients may call this service."""
    engine: Literal["builtin", "vllm"] = "builtin"
    vllm_url: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    organization: str = "local"
    """The second part of a tuned model's name, and `owned_by` and `organization_id`."""

    @property
    def files(self) -> Path:
        return self.data_dir / "files"

    @property
    def runs(self) -> Path:
        return self.data_dir / "runs"

    @property
    def jobs(self) -> Path:
        return self.data_dir / "jobs"

    @property
    def database_url(self) -> str:
        return self.store_url or f"sqlite:///{self.data_dir / 'store.sqlite'}"

    @property
    def queue_url(self) -> str:
        """Of DBOS: a database of its own under SQLite, which has one writer at a time; the same one under Postgres."""
        return self.store_url or f"sqlite:///{self.data_dir / 'queue.sqlite'}"
