"""The service in a thread of this process, behind a real socket: for settings without an option, and to look inside."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI

from ift_peft.serve.app import create_app
from ift_peft.serve.server import configured
from ift_peft.serve.service import Service
from ift_peft.serve.settings import Limits, Settings


@dataclass
class Inside:
    """A service over `settings`, whose port is given to it. With `idle` it has no trainers and engines."""

    settings: Settings
    idle: bool = False
    service: Service = field(init=False)
    app: FastAPI = field(init=False)
    port: int = field(init=False)
    _clients: dict[str, OpenAI] = field(default_factory=dict)  # to make one takes a second: each is kept

    def start(self) -> Inside:
        self.service = Service(self.settings)
        if self.idle:  # both take seconds to start
            self.service.start, self.service.stop = self.service.housekeeping.start, partial(_stop, self.service)  # type: ignore[method-assign]
        self.app = create_app(self.service)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._server = uvicorn.Server(configured(self.app, self.settings))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        self.until(lambda: self._server.started or not self._thread.is_alive())
        assert self._thread.is_alive()
        return self

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        self._socket.close()
        while self._clients:
            self._clients.popitem()[1].close()
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def data_dir(self) -> Path:
        return self.settings.data_dir

    def service_routes(self) -> list[tuple[str, str]]:
        """Method and path of every route that the service describes."""
        return [(method.upper(), path) for path, item in self.app.openapi()["paths"].items() for method in item]

    def client(self, api_key: str = "none") -> OpenAI:
        if api_key not in self._clients:
            self._clients[api_key] = OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)
        return self._clients[api_key]

    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def until(self, condition: Callable[[], object]) -> None:
        wait_for(condition, seconds=30)


def _stop(service: Service) -> None:
    service.housekeeping.stop()
    service.release()


@contextmanager
def serving(data_dir: Path, *, limits: Limits = Limits(), **settings: Any) -> Iterator[Inside]:  # noqa: B008
    """Files, keys and limits of a service over `data_dir`, until the end of the block."""
    running = Inside(Settings(data_dir=data_dir, limits=limits, **settings), idle=True).start()
    try:
        yield running
    finally:
        running.stop()


def wait_for(condition: Callable[[], object], *, seconds: float = 20) -> None:
    """Until `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
