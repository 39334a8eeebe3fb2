"""A server in a thread of this process, behind a real socket: for limits that have no option, and to look inside."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass, field

import uvicorn
from openai import AsyncOpenAI, OpenAI

from ift_peft.serve.app import create_app
from ift_peft.serve.service import Service
from ift_peft.serve.settings import Settings


@dataclass
class Inside:
    """A service over `settings`, whose port is given to it."""

    settings: Settings
    service: Service = field(init=False)
    _clients: list[OpenAI] = field(default_factory=list)

    def start(self) -> Inside:
        self.service = Service(self.settings)
        app = create_app(self.service)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=20))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        self.until(lambda: self._server.started)
        return self

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        for client in self._clients:
            client.close()
        assert not self._thread.is_alive()

    def client(self) -> OpenAI:
        made = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        self._clients.append(made)
        return made

    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def until(self, true: object, seconds: float = 30) -> None:
        assert callable(true)
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.01)
