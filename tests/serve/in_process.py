"""The service in a thread of this process, behind a real socket: with settings that no option gives, and soon there."""

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
from openai import OpenAI

from ift_peft.serve.app import create_app
from ift_peft.serve.server import configured
from ift_peft.serve.service import Service
from ift_peft.serve.settings import Limits, Settings


@dataclass
class Running:
    service: Service
    port: int
    app: FastAPI
    clients: dict[str, OpenAI] = field(default_factory=dict)  # to make one takes a second: each is kept

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def data_dir(self) -> Path:
        return self.service.settings.data_dir

    def service_routes(self) -> list[tuple[str, str]]:
        """Method and path of every route that the service describes."""
        return [(method.upper(), path) for path, item in self.app.openapi()["paths"].items() for method in item]

    def client(self, api_key: str = "none") -> OpenAI:
        if api_key not in self.clients:
            self.clients[api_key] = OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=30)
        return self.clients[api_key]

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)


def _stop(service: Service) -> None:
    service.housekeeping.stop()
    service.release()


@contextmanager
def serving(data_dir: Path, *, limits: Limits = Limits(), **settings: Any) -> Iterator[Running]:  # noqa: B008
    """A service over `data_dir` until the end of the block."""
    service = Service(Settings(data_dir=data_dir, limits=limits, **settings))
    # Files, keys and limits alone: trainers and engines take seconds to start, and nothing here asks them.
    service.start, service.stop = service.housekeeping.start, partial(_stop, service)  # type: ignore[method-assign]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = create_app(service)
        server = uvicorn.Server(configured(app, service.settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        running = Running(service, listening.getsockname()[1], app)
        try:
            yield running
        finally:
            for client in running.clients.values():
                client.close()
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


def wait_for(condition: Callable[[], object]) -> None:
    """Until `condition` holds, for 20 s."""
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")
