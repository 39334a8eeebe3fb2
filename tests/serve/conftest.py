"""A server of its own process over a data folder, asked by the unmodified OpenAI client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import pytest_socket
from openai import OpenAI

from tests.conftest import OFFLINE, ROOT

OPEN: list[OpenAI] = []


@dataclass
class Server:
    """`ift serve` over `data_dir`. It may be stopped by any signal and started again over the same folder."""

    data_dir: Path
    options: tuple[str, ...] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    env: dict[str, str] = field(default_factory=dict)
    clients: dict[tuple[object, ...], OpenAI] = field(default_factory=dict)
    """Those that were asked for: making one takes long. They stay open until the session ends."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.data_dir.parent / f"{self.data_dir.name}.log").read_text("utf-8", errors="replace")

    def client(self, api_key: str = "none", *, max_retries: int = 0, timeout: float = 120) -> OpenAI:
        which = (api_key, max_retries, timeout, self.port)
        if which not in self.clients:
            made = OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=max_retries, timeout=timeout)
            self.clients[which] = made
            OPEN.append(made)
        return self.clients[which]

    def start(self) -> Server:
        if not self.port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "ift_peft",
            "serve",
            "--port",
            str(self.port),
            "--data-dir",
            str(self.data_dir),
        ]
        paths = f"{OFFLINE}{os.pathsep}{ROOT}"
        with (self.data_dir.parent / f"{self.data_dir.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.options],
                cwd=self.data_dir.parent,
                env={**os.environ, **self.env, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=log,
            )
        for _ in range(1200):
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log}")
            try:
                httpx.get(f"{self.url}/healthz", timeout=5).raise_for_status()
                return self
            except httpx.HTTPError:
                time.sleep(0.1)
        raise AssertionError(f"the server did not start:\n{self.log}")

    def stop(self, number: int = signal.SIGTERM, *, timeout: float = 60) -> int:
        """Send it a signal and wait for its end; its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the server did not end:\n{self.log}") from None


@pytest.fixture(scope="session", autouse=True)
def _clients_are_closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    """In the place of the one for all tests: sockets are refused but for loopback."""
    pytest_socket.socket_allow_hosts(["127.0.0.1", "::1"])
    yield
    pytest_socket._remove_restrictions()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that the tests of one file share."""
    running = Server(tmp_path_factory.mktemp("serve") / "data")
    running.data_dir.mkdir()
    running.start()
    yield running
    running.stop()
    assert "Traceback" not in running.log, running.log
