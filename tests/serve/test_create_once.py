"""A create that the client repeats makes one job, whatever went wrong on the way."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import pytest
from openai import OpenAI

from tests.serve.conftest import Server
from tests.serve.walk import FEW, rows

Fault = Literal["refused before", "lost after", "dropped after", "late", "none"]
LATE = 8.0  # seconds; a client that waits half of it gives up, however busy the machine is


class Between(ThreadingHTTPServer):
    """What lies between client and server: it passes every request on but does as `faults` say to the first ones."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.behind = port
        self.faults: list[Fault] = []
        self.passed = 0

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what is meant here."""


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Between

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault: Fault = self.server.faults.pop(0) if self.server.faults else "none"
        if fault == "refused before":
            self._answer(503, b"{}")
            return
        status, answer = self._pass_on(body)
        self.server.passed += 1
        if fault == "lost after":
            self._answer(502, b"{}")
        elif fault == "dropped after":
            self.close_connection = True
        elif fault == "late":
            threading.Event().wait(LATE)
            self._answer(status, answer)
        else:
            self._answer(status, answer)

    def _pass_on(self, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        headers = {**dict(self.headers.items()), "Host": f"127.0.0.1:{self.server.behind}"}
        connection.request("POST", self.path, body, headers)
        answer = connection.getresponse()
        try:
            return answer.status, answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def between(server: Server) -> Iterator[Between]:
    proxy = Between(server.port)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture(scope="module")
def file(server: Server) -> str:
    return str(server.client().files.create(file=("a.jsonl", rows(10)), purpose="fine-tune").id)


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults",
    [
        ["refused before"],
        ["lost after"],
        ["dropped after"],
        ["late"],
        ["lost after", "dropped after"],
        ["refused before", "late"],
    ],
    ids=" then ".join,
)
def test_a_repeated_create_makes_one_job(server: Server, between: Between, file: str, faults: list[Fault]) -> None:
    between.faults = list(faults)
    marker = "-".join(faults).replace(" ", "_")
    url = f"http://127.0.0.1:{between.server_address[1]}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=2, timeout=LATE / 2 if "late" in faults else 60) as client:
        job = client.fine_tuning.jobs.create(
            model="tiny", training_file=file, metadata={"marker": marker}, extra_body={"recipe": FEW}
        )
    assert not between.faults  # each came to pass
    assert between.passed == len(faults) + 1 - faults.count("refused before")
    direct = server.client()
    made = direct.fine_tuning.jobs.list(metadata={"marker": marker}).data
    assert [one.id for one in made] == [job.id]
    direct.fine_tuning.jobs.cancel(job.id)


@pytest.mark.slow
def test_two_equal_creates_that_are_meant_make_two_jobs(server: Server, file: str) -> None:
    client = server.client()
    asked = {"model": "tiny", "training_file": file, "metadata": {"marker": "two"}, "extra_body": {"recipe": FEW}}
    first, second = (client.fine_tuning.jobs.create(**asked) for _ in range(2))
    assert first.id != second.id
    for job in (first, second):
        client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.slow
def test_a_key_of_the_callers_own_decides(server: Server, file: str) -> None:
    client = server.client()
    asked = {"model": "tiny", "training_file": file, "extra_body": {"recipe": FEW}}
    first, second, third = (
        client.fine_tuning.jobs.create(**asked, extra_headers={"Idempotency-Key": key}) for key in ("a", "a", "b")
    )
    assert first.id == second.id != third.id
    for job in (first, third):
        client.fine_tuning.jobs.cancel(job.id)
