"""What goes wrong around a service: jobs that cannot end well, databases, disks, clients and locks that are not as
they should be."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import httpx
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from ift_peft.errors import RunError
from tests.conftest import Ift
from tests.faults.conftest import Observed
from tests.faults.serving import (
    POISON,
    RATE,
    Watched,
    _clients_are_closed,
    _no_network,
    ended,
    eventually,
    held,
    refusal,
)
from tests.serve import jobs
from tests.serve.conftest import Server
from tests.serve.walk import rows

__all__ = ["_clients_are_closed", "_no_network"]
pytestmark = pytest.mark.slow
KILLED = "its trainer is killed three times"
HELD_SECONDS = 36  # longer than SQLite waits for another writer, 30 s


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server over a folder in which one that was killed has left its locks."""
    running = Server(tmp_path_factory.mktemp("faults") / "data", RATE)
    (running.data_dir / "devices").mkdir(parents=True)
    (running.data_dir / ".lock").write_text("999999\n")
    (running.data_dir / "devices" / "cpu.lock").write_text("999999\n")
    running.start()
    yield running
    running.stop()
    assert "Traceback" not in running.log, running.log


@pytest.fixture
def client(server: Server) -> OpenAI:
    return server.client(timeout=200)


@pytest.fixture(scope="module")
def line(server: Server) -> dict[str, FineTuningJob]:
    """Each poison job, one whose trainer is killed thrice, and a good one behind them, made at once; how they ended."""
    watched = Watched(server)
    made = {kind: watched.create(kind) for kind in [*POISON, "short"]}
    made[KILLED] = watched.create("long", priority=-100)
    _kill_thrice(server, made[KILLED])
    return {kind: jobs.wait(watched.client, job, ended, seconds=400) for kind, job in made.items()}


def _kill_thrice(server: Server, job: str) -> None:
    killed: set[int] = set()

    def done() -> bool:
        process = jobs.trainers(server.data_dir).get(job)
        if process is not None and process not in killed:
            os.kill(process, signal.SIGKILL)
            killed.add(process)
        return len(killed) == 3

    eventually(done, "its trainer is not started again")


@pytest.mark.fault(
    "service", "a job: {poison}", expected="failed with a code of its own; the next job succeeds", rare=True
)
@pytest.mark.parametrize("poison", [*POISON, KILLED])
def test_a_poison_job_fails_and_the_queue_goes_on(
    line: dict[str, FineTuningJob], observed: Observed, poison: str
) -> None:
    failed, good = line[poison], line["short"]
    assert failed.status == "failed" and failed.error is not None and failed.fine_tuned_model is None
    assert failed.error.code in (POISON[poison][1] if poison in POISON else {"trainer_died"}), failed.error
    assert good.status == "succeeded" and (good.finished_at or 0) >= (failed.finished_at or 0)
    observed(f"failed, {failed.error.code}; the next one {good.status}")


@pytest.mark.fault(
    "service",
    "lock files of processes that are gone: of the data folder, of the device",
    expected="they hold nothing up",
    rare=True,
)
def test_stale_locks_hold_nothing_up(line: dict[str, FineTuningJob], server: Server, observed: Observed) -> None:
    assert line["short"].status == "succeeded"
    assert (server.data_dir / "devices" / "cpu.lock").is_file()
    observed(f"the service started over them, and trained: a job {line['short'].status}")


@pytest.mark.fault(
    "service",
    "the records are locked for 2 s by another process",
    expected="requests wait; none fails, and reading goes on",
)
def test_a_store_locked_for_a_moment_is_waited_for(server: Server, client: OpenAI, observed: Observed) -> None:
    with ThreadPoolExecutor(1) as beside:
        with held(server.data_dir / "store.sqlite"):
            listed = client.files.list().data
            upload = beside.submit(lambda: client.files.create(file=("rows.jsonl", rows(12)), purpose="fine-tune"))
            time.sleep(2)
            assert not upload.done(), "it was answered before it could be kept"
            assert client.files.list().data == listed
        made = upload.result()
    assert client.files.content(made.id).content == rows(12)
    assert len(client.files.list().data) == len(listed) + 1
    observed(f"lists were answered meanwhile, the upload ({made.status}) when the lock was gone")


@pytest.mark.fault(
    "service",
    "records and queue are locked by another process for longer than SQLite waits, beside a training",
    expected="503 with Retry-After, nothing half-written; the job goes on and succeeds",
    rare=True,
)
def test_a_store_locked_for_long_is_told(server: Server, client: OpenAI, observed: Observed) -> None:
    watched = Watched(server)
    before = {path.name for path in (server.data_dir / "files").iterdir()}
    count = len(client.files.list().data)
    job = watched.create("short")
    eventually(lambda: jobs.trainers(server.data_dir), "no trainer")
    with held(server.data_dir / "store.sqlite"), held(server.data_dir / "queue.sqlite"):
        began = time.monotonic()
        error = refusal(lambda: client.files.create(file=("rows.jsonl", rows(12)), purpose="fine-tune"))
        assert error is not None and (error.status_code, error.code) == (503, "store_unavailable")
        assert error.response.headers["Retry-After"].isdigit()
        assert str(client.fine_tuning.jobs.retrieve(job).status) in ("validating_files", "queued", "running")
        time.sleep(max(0, HELD_SECONDS - (time.monotonic() - began)))
    found = jobs.wait(client, job, ended, seconds=300)
    assert found.status == "succeeded", found.error
    assert len(client.files.list().data) == count + 2  # its rows, and its file of metrics
    after = {path.name for path in (server.data_dir / "files").iterdir()}
    assert len(after - before) == 2 and "Traceback" not in server.log
    next_one = jobs.wait(client, watched.create("short"), ended, seconds=300)
    assert next_one.status == "succeeded"
    observed(f"503 store_unavailable, Retry-After {error.response.headers['Retry-After']}; the job {found.status}")


@pytest.mark.fault(
    "service",
    "the queue is locked by another process while a job is made",
    expected="the job is acknowledged all the same, and done later; other requests are answered",
    rare=True,
)
def test_a_locked_queue_keeps_no_job(server: Server, client: OpenAI, observed: Observed) -> None:
    watched = Watched(server)
    with held(server.data_dir / "queue.sqlite"):
        job = watched.create("short")
        assert client.models.list().data and httpx.get(f"{server.url}/healthz").status_code == 200
    found = jobs.wait(client, job, ended, seconds=300)
    assert found.status == "succeeded", found.error
    observed(f"acknowledged while the queue was locked, {found.status} after the lock was gone")


@pytest.mark.fault("service", "a second service over one data folder", expected="refused; the first goes on")
def test_a_second_service_is_refused(server: Server, client: OpenAI, ift: Ift, observed: Observed) -> None:
    before = client.files.list().data
    was = os.umask(0o077)
    refused = ift("serve", "--port", "0", "--data-dir", str(server.data_dir))
    os.umask(was)
    assert refused.returncode == RunError.exit_code and "another service" in refused.stderr
    assert client.files.list().data == before
    found = " ".join(refused.stderr.split()).partition("found ")[2].partition(" fix ")[0]
    observed(f"exit {refused.returncode}: {found}")


@pytest.mark.fault(
    "service",
    "slow clients: 200 idle connections, 40 half heads, 40 half bodies, 8 answers that are not read",
    expected="others are answered",
)
def test_slow_clients_hold_up_nobody_else(server: Server, client: OpenAI, observed: Observed, every: bool) -> None:
    large = client.files.create(file=("rows.jsonl", rows(30_000)), purpose="fine-tune")
    with _slow_clients(server, large.id) as slow:
        file = client.files.create(file=("rows.jsonl", rows(12)), purpose="fine-tune")
        assert client.files.content(file.id).content == rows(12)
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        if every:  # for which the server imports torch
            Watched(server).answers("tiny")
        still = sum(_is_open(one) for one in slow[:200])
    observed(f"an upload and a download were answered beside {len(slow)} of them, {still} idle ones still open")


@contextmanager
def _slow_clients(server: Server, large: str) -> Iterator[list[socket.socket]]:
    chat = _head(server, "/v1/chat/completions", 100)
    form = _head(server, "/v1/files", 10_000, kind="multipart/form-data; boundary=x") + b"--x\r\n"
    unread = f"GET /v1/files/{large}/content HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode()
    slow: list[socket.socket] = []
    try:
        for content in [b""] * 200 + [chat[:30]] * 40 + [chat + b'{"model"'] * 20 + [form] * 20 + [unread] * 8:
            slow.append(socket.create_connection(("127.0.0.1", server.port)))
            slow[-1].sendall(content)
        yield slow
    finally:
        for one in slow:
            one.close()


def _head(server: Server, path: str, length: int, *, kind: str = "application/json") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode()


def _is_open(one: socket.socket) -> bool:
    one.setblocking(False)
    try:
        return one.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


@pytest.mark.fault("service", "a client that has closed its sending half", expected="it is answered, or let go of")
def test_half_closed_connections_are_not_kept(server: Server, observed: Observed) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as one:
        one.sendall(f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        one.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := one.recv(65536):
            answer += piece
    assert answer == b"" or answer.startswith(b"HTTP/1.1 200")
    observed("answered with 200, and closed" if answer else "closed")


HOSTILE: dict[str, str] = {
    "n_epochs 10^9": '{"hyperparameters": {"n_epochs": 1000000000}}',
    "n_epochs NaN": '{"hyperparameters": {"n_epochs": NaN}}',
    "batch size 0": '{"hyperparameters": {"batch_size": 0}}',
    "batch size -1": '{"hyperparameters": {"batch_size": -1}}',
    "batch size of 400 digits": '{"hyperparameters": {"batch_size": %s}}' % ("9" * 400),
    "multiplier Infinity": '{"hyperparameters": {"learning_rate_multiplier": Infinity}}',
    "multiplier 1e999": '{"hyperparameters": {"learning_rate_multiplier": 1e999}}',
    "seed 2^63": '{"seed": 9223372036854775808}',
    "seed -1": '{"seed": -1}',
    "seed true": '{"seed": true}',
    "n_epochs true": '{"hyperparameters": {"n_epochs": true}}',
    "a suffix of 1 MB": '{"suffix": "%s"}' % ("x" * 1_000_000),
    "a suffix with NUL": '{"suffix": "a\\u0000b"}',
    "a suffix with a lone surrogate": '{"suffix": "a\\ud800b"}',
    "a recipe 10,000 deep": '{"recipe": %s}' % ('{"a":' * 10_000 + "1" + "}" * 10_000),
    "a model that is a path": '{"model": "../../etc/passwd"}',
    "a file that is a path": '{"training_file": "../store.sqlite"}',
    "steps 10^30": '{"recipe": {"training": {"max_steps": 1000000000000000000000000000000}}}',
    "a rank of 0": '{"recipe": {"adapter": {"r": 0}}}',
}


@pytest.mark.fault("service", "parameters of a job: {hostile}", expected="400 in the form of errors; no job is made")
@pytest.mark.parametrize("hostile", [*HOSTILE])
def test_hostile_parameters_are_refused(
    server: Server, client: OpenAI, observed: Observed, file: str, hostile: str
) -> None:
    given = HOSTILE[hostile].removeprefix("{").removesuffix("}")
    rest = {"model": '"tiny"', "training_file": f'"{file}"'}
    body = ", ".join([given, *(f'"{name}": {value}' for name, value in rest.items() if f'"{name}"' not in given)])
    before = len(client.fine_tuning.jobs.list(limit=100).data)
    answer = httpx.post(
        f"{server.url}/v1/fine_tuning/jobs",
        content=f"{{{body}}}".encode(),
        headers={"Content-Type": "application/json"},
        timeout=100,
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 5000
    assert len(client.fine_tuning.jobs.list(limit=100).data) == before
    observed(f"400 {error['code']}, {error['param']}")


@pytest.fixture(scope="module")
def file(server: Server) -> str:
    return jobs.upload(server.data_dir, jobs.chats())


@pytest.mark.fault(
    "service", "a clock that jumps back and forth between records", expected="lists stay in the order of making"
)
def test_lists_do_not_follow_the_clock(server: Server, client: OpenAI, observed: Observed) -> None:
    made = [client.files.create(file=("rows.jsonl", rows(10 + n)), purpose="fine-tune").id for n in range(3)]
    with closing(sqlite3.connect(server.data_dir / "store.sqlite", timeout=30)) as store, store:
        for file_id, jump in zip(made, (86_400 * 365, 0, -86_400 * 365), strict=True):
            store.execute("update files set created_at = created_at + ? where id = ?", (jump, file_id))
    listed = [one.id for one in client.files.list(order="asc") if one.id in made]
    pages = [one.id for one in client.files.list(order="asc", limit=1) if one.id in made]
    assert listed == pages == made
    observed(f"{len(listed)} of {len(made)} in the order of making, in one list and in pages of one")
