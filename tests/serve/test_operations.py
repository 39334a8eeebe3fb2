"""The service as those who run it see it: the real process, its log, its figures, how it ends and what it refuses."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from tests.conftest import Ift
from tests.serve.conftest import Server
from tests.serve.inside import wait_for
from tests.serve.test_files import ROWS, row


def send_half(server: Server) -> socket.socket:
    """A connection that has sent the first part of an upload, of which something is on the disk."""
    client = socket.create_connection(("127.0.0.1", server.port))
    head = b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + ROWS * 40
    client.sendall(head + b"Content-Length: 500000\r\n\r\n" + part)
    wait_for(lambda: any(path.stat().st_size for path in (server.data_dir / "files").glob(".upload-*")))
    return client


@pytest.mark.slow
def test_killed_while_files_arrive_it_keeps_what_it_acknowledged_and_nothing_else(tmp_path: Path) -> None:
    """One server process is killed, started again, asked to end, and ended by a second signal."""
    server = Server(tmp_path / "data")
    server.data_dir.mkdir()
    server.start()
    client = server.client()
    kept = client.files.create(file=("SECRETNAME.jsonl", ROWS + row("SECRETROW")), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=("rows.jsonl", row("SECRETROW")), purpose="fine-tune")
    answer = httpx.get(f"{server.url}/v1/files?purpose=SECRETQUERY", headers={"Authorization": "Bearer SECRETKEY"})
    assert answer.headers["x-request-id"].startswith("req-")
    figures = httpx.get(f"{server.url}/metrics").text
    assert 'ift_http_requests_total{method="POST",route="/v1/files",status="200"} 1.0' in figures
    assert 'ift_http_requests_total{method="POST",route="/v1/files",status="400"} 1.0' in figures
    assert 'ift_jobs{status="running"} 0.0' in figures
    assert "ift_files 1.0" in figures
    uploaded = next(line for line in figures.splitlines() if line.startswith("ift_upload_bytes_total"))
    assert float(uploaded.split()[1]) > len(ROWS)
    assert "ift_resident_bytes" in figures and "ift_http_request_seconds_bucket" in figures

    half = send_half(server)
    server.stop(signal.SIGKILL)
    half.close()
    assert len(list((server.data_dir / "files").iterdir())) == 2
    server.start()
    assert [path.name for path in (server.data_dir / "files").iterdir()] == [kept.id]
    assert [one.id for one in client.files.list()] == [kept.id]
    assert client.files.content(kept.id).content == ROWS + row("SECRETROW")

    half = send_half(server)
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "Shutting down" in server.log)
    time.sleep(0.3)
    assert server.process.poll() is None, "the upload may still end"
    assert server.stop(signal.SIGTERM, timeout=5) == 128 + signal.SIGTERM, "a second signal ends it at once"
    half.close()
    client.close()

    lines = [json.loads(line) for line in server.log.splitlines()]
    assert all({"time", "level", "event"} <= line.keys() for line in lines)
    assert "SECRET" not in server.log
    assert "Traceback" not in server.log
    statuses = [line["status"] for line in lines if line["event"] == "request" and line["route"] == "/v1/files"]
    assert statuses[:3] == [200, 400, 200]


def test_others_can_reach_it_only_with_a_key(ift: Ift, tmp_path: Path) -> None:
    done = ift("serve", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2
    assert "expected a key" in done.stderr and "found none" in done.stderr and "ift keys create" in done.stderr


def test_options_that_cannot_be_had_are_told_together(ift: Ift) -> None:
    done = ift("serve", "--base", "a b", "--base", "x=", "--engine", "vllm", "--organization", "Ä")
    assert done.returncode == 2
    assert all(text in done.stderr for text in ("'a b'", "'x='", "--engine vllm alone", "--organization"))


def test_a_port_that_is_taken_is_told(ift: Ift) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = ift("serve", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "Address already in use" in done.stderr


def test_without_its_packages_it_says_how_to_have_them(ift: Ift, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["ift_peft.cli.app"], "find_spec", lambda name: None)
    for command in (("serve",), ("keys", "list"), ("backup", "--to", "x.tar")):
        done = ift(*command)
        assert done.returncode == 5
        assert "pip install 'ift_peft[serve]'" in done.stderr


def test_keys_are_made_listed_rotated_and_revoked(ift: Ift) -> None:
    made = ift("keys", "create", "laptop", "--scope", "inference", "--days", "2")
    text = made.stdout.strip()
    key_id = text[7:23]
    assert made.returncode == 0 and text.startswith("sk-ift-") and key_id in made.stderr
    listed = ift("keys", "list")
    assert key_id in listed.stdout and "laptop" in listed.stdout and text.partition(".")[2] not in listed.stdout
    rotated = ift("keys", "rotate", key_id, "--grace-hours", "1")
    assert rotated.returncode == 0 and rotated.stdout.strip() != text
    assert ift("keys", "revoke", key_id).returncode == 0
    assert f"revoked {time.strftime('%Y')}" in ift("keys", "list").stdout
    assert ift("keys", "revoke", "nobody").returncode == 2
    assert "scopes out of inference" in ift("keys", "create", "x", "--scope", "root").stderr
