"""Files through the API: what is refused and why, what is kept, and that what is deleted is gone."""

from __future__ import annotations

import json
import logging
import resource
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import JSON, insert, update

from ift_peft.serve.files.upload import display_name
from ift_peft.serve.settings import Limits
from ift_peft.serve.store.tables import files, jobs
from tests.serve.inside import Inside, serving, wait_for

pytestmark = pytest.mark.slow

LIMITS = Limits(
    upload_bytes=60_000, line_bytes=2_000, rows=200, body_bytes=5_000, sweep_seconds=0.05, requests_per_minute=100_000
)


def row(question: str, answer: str = "yes") -> bytes:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}, ensure_ascii=False).encode() + b"\n"


ROWS = b"".join(row(f"Is {number} a number?") for number in range(12))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    with serving(tmp_path_factory.mktemp("files") / "data", limits=LIMITS) as running:
        yield running


def refused(service: Inside, content: bytes, **options: Any) -> openai.APIStatusError:
    before = {path.name for path in (service.data_dir / "files").iterdir()}
    given = {"purpose": "fine-tune", **options}
    with pytest.raises(openai.APIStatusError) as caught:
        service.client().files.create(file=("rows.jsonl", content), **given)
    assert {path.name for path in (service.data_dir / "files").iterdir()} == before
    return caught.value


def test_a_file_is_kept_listed_read_and_deleted(service: Inside) -> None:
    client = service.client()
    kept = [client.files.create(file=(name, ROWS), purpose="fine-tune") for name in ("a/b/评论.jsonl", "two.jsonl")]
    assert [one.filename for one in kept] == ["评论.jsonl", "two.jsonl"]
    assert (kept[0].bytes, kept[0].status, kept[0].expires_at) == (len(ROWS), "processed", None)
    assert client.files.retrieve(kept[0].id) == kept[0]
    assert client.files.content(kept[0].id).content == ROWS
    ids = [one.id for one in kept]
    assert [one.id for one in client.files.list(limit=1)] == ids[::-1], "the client walks over the pages by itself"
    assert [one.id for one in client.files.list(order="asc")] == ids
    assert [one.id for one in client.files.list(purpose="fine-tune-results")] == []
    for file_id in ids:
        assert client.files.delete(file_id).deleted
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file_id)
    assert not list((service.data_dir / "files").iterdir())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"\xff\xfe", "found 0xff at byte 1"),
        (b'{"messages": NaN}', "not JSON: NaN"),
        (b'{"prompt": "a", "prompt": "b"}', "prompt twice in one object"),
        (b"[" * 1_900, "more than 16 objects and lists inside each other"),
        (b"9" * 1_900, "expected a JSON object; found a number"),
        (b'"' + b"x" * 3_000 + b'"', "longer than 2,000 bytes"),
        (b'{"prompt": "\\ud800", "completion": "b"}', "half of a surrogate pair"),
        (b'{"prompt": "\\u0000", "completion": "b"}', "U+0000"),
        (b'{"prompt": "a\x00", "completion": "b"}', "a NUL at byte 14"),
        (b'{"prompt": "a", "completion": "b"}', "one form a file"),
        (b'{"text": "a"}', "expected messages, or prompt and completion"),
        (b'{"messages": []}', "found an empty list"),
        (b'{"messages": ["a"]}', "message 1: expected an object; found text"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "the conversation to end with the assistant"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "a user message before the answer"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "message 1: content: expected text; found none"),
        (b'{"messages": [{"role": "user", "content": null}]}', "message 1: content: expected text; found nothing"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "no images, sound or files"),
        (b'{"messages": [{"role": "developer", "content": "a"}]}', "the role developer; call it system"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}', "tool calls are not trained on"),
        (b'{"messages": [{"role": "robot", "content": "a"}]}', "one of system, user, assistant; found another"),
        (b'{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}', "weight: every assistant message"),
        (b'{"messages": [{"role": "assistant", "tool_calls": []}]}', "tool_calls: tool calls are not trained on"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": []}', "tools are not trained on"),
        (b'{"messages": [], "colour": 1}', "the row: colour is not a field of it"),
    ],
)
def test_a_line_that_cannot_be_learnt_is_told_by_number_and_reason(service: Inside, line: bytes, says: str) -> None:
    error = refused(service, ROWS + line + b"\n" + ROWS)
    assert error.status_code == 400
    assert error.code == "invalid_file_format"
    assert error.param == "file"
    assert f"line 13: {says}" in error.message or (f"line 13: {says[:8]}" and says in error.message)
    assert "line 14" not in error.message


def test_all_faults_are_told_at_once_up_to_twenty_and_none_quotes_a_row(service: Inside) -> None:
    secret = json.dumps({"messages": [{"role": "user", "content": "SECRETTEXT"}]}).encode() + b"\n"
    message = refused(service, secret * 30).message
    assert [f"line {number}:" in message for number in (1, 20, 21)] == [True, True, False]
    assert "and 10 lines more" in message
    assert "SECRETTEXT" not in message
    assert "found 3" in refused(service, ROWS[: len(row("Is 0 a number?")) * 3]).message
    assert "more than 200 rows" in refused(service, row("a") * 300).message


def test_what_training_reads_is_taken(service: Inside) -> None:
    """A byte order mark, blank lines, CRLF, no last line feed; and questions with completions."""
    lines = b"\xef\xbb\xbf" + ROWS.replace(b"\n", b"\r\n\r\n").rstrip()
    pairs = b"".join(json.dumps({"prompt": f"{n}?", "completion": "ja"}).encode() + b"\n" for n in range(10))
    client = service.client()
    for content in (lines, pairs):
        kept = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
        assert client.files.content(kept.id).content == content
        client.files.delete(kept.id)


def test_what_is_asked_of_a_file_is_refused_or_done(service: Inside) -> None:
    for purpose in ("assistants", "batch", "vision", "user_data", "evals"):
        error = refused(service, ROWS, purpose=purpose)
        assert (error.status_code, error.param) == (400, "purpose")
    for expires in ({"anchor": "created_at", "seconds": 60}, {"anchor": "last_active_at", "seconds": 3600}):
        assert "expires_after" in str(refused(service, ROWS, expires_after=expires).param)
    assert refused(service, ROWS, extra_body={"colour": "red"}).code == "unknown_parameter"
    assert refused(service, b"x" * 70_000).status_code == 413
    with service.http() as http:
        answers = [
            http.post("/v1/files", json={"purpose": "fine-tune"}),
            http.post("/v1/files", data={"purpose": "fine-tune"}),
            http.post("/v1/files", files={"file": ("a", ROWS)}),
            http.post(
                "/v1/files", content=b"--x\r\nnothing", headers={"content-type": "multipart/form-data; boundary=x"}
            ),
            http.post("/v1/files", content=b"--x\r\n", headers={"content-type": "multipart/form-data; boundary=x"}),
        ]
    assert [answer.status_code for answer in answers] == [400] * 5
    assert all(answer.json()["error"]["message"] for answer in answers)


def test_a_file_that_a_job_uses_stays_until_the_job_has_ended(service: Inside) -> None:
    client = service.client()
    kept = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    add_job(service, kept.id, status="running")
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.delete(kept.id)
    assert caught.value.code == "file_in_use"
    with service.service.store.begin() as connection:
        connection.execute(update(files).values(expires_at=1))
    time.sleep(0.3)  # a few sweeps
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(kept.id)
    assert (service.data_dir / "files" / kept.id).exists(), "the trainer may still read it"
    with service.service.store.begin() as connection:
        connection.execute(update(jobs).values(status="cancelled"))
    wait_for(lambda: not (service.data_dir / "files" / kept.id).exists())


def add_job(service: Inside, file_id: str, *, status: str, run: str | None = None, job: str = "ftjob-1") -> None:
    settings: dict[str, Any] = {one.name: {} for one in jobs.c if isinstance(one.type, JSON) and not one.nullable}
    values = settings | {
        "id": job,
        "created_at": 1,
        "status": status,
        "model": "tiny",
        "base": "tiny",
        "seed": 1,
        "training_file": file_id,
        "result_files": [],
        "run": run,
    }
    with service.service.store.begin() as connection:
        connection.execute(insert(jobs).values(**values))


def test_an_expiry_is_kept_and_told(service: Inside) -> None:
    client = service.client()
    kept = client.files.create(
        file=("rows.jsonl", ROWS), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert kept.expires_at == kept.created_at + 3600
    client.files.delete(kept.id)


def test_a_deleted_file_leaves_no_byte_behind(tmp_path: Path) -> None:
    """Neither in files nor in the database and its log, whose records are searched as bytes."""
    with serving(tmp_path / "data", limits=LIMITS) as running:
        client = running.client()
        content = ROWS + row("MARKEROFCONTENT")
        kept = client.files.create(file=("MARKEROFNAME.jsonl", content), purpose="fine-tune")
        assert found(tmp_path, b"MARKEROFCONTENT") and found(tmp_path, b"MARKEROFNAME")
        client.files.delete(kept.id)
        assert not found(tmp_path, b"MARKEROFCONTENT")
        assert not found(tmp_path, b"MARKEROFNAME")


def found(folder: Path, marker: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and marker in path.read_bytes()]


def test_a_start_removes_what_a_crash_has_left(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with serving(data_dir) as running:
        kept = running.client().files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        (data_dir / "files" / ".upload-abc").write_bytes(b"half")
        (data_dir / "files" / f"file-{'a' * 24}").write_bytes(b"whole")
    with sqlite3.connect(data_dir / "store.sqlite") as store:
        assert store.execute("SELECT count(*), sum(rows) FROM files").fetchone() == (1, 12)
    with serving(data_dir) as running:
        assert [path.name for path in (data_dir / "files").iterdir()] == [kept.id]
        assert running.client().files.content(kept.id).content == ROWS


def test_a_name_is_for_display_alone() -> None:
    assert display_name("../../etc/passwd") == "passwd"
    assert display_name("C:\\rows\\a.jsonl") == "a.jsonl"
    assert display_name("a\r\nSet-Cookie: b\u202e.jsonl") == "aSet-Cookie: b.jsonl"
    assert display_name("/") == "file"
    assert len(display_name("x" * 5_000)) == 200


def test_an_upload_that_breaks_off_leaves_nothing(service: Inside, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ift_peft")
    head = b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + ROWS
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        client.sendall(head + b"Content-Length: 50000\r\n\r\n" + part)
        wait_for(lambda: list((service.data_dir / "files").glob(".upload-*")))
    wait_for(lambda: not list((service.data_dir / "files").iterdir()))
    wait_for(lambda: 499 in [getattr(record, "status", None) for record in caplog.records])
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], "it is no fault of ours"


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files fails like a disk without room, in the middle of a write."""
    with serving(tmp_path / "data") as running:
        client = running.client()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        try:
            with pytest.raises(openai.InternalServerError) as caught:
                client.files.create(file=("rows.jsonl", ROWS * 400), purpose="fine-tune")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (caught.value.status_code, caught.value.code) == (507, "insufficient_storage")
        assert not list((running.data_dir / "files").iterdir())
        assert client.files.create(file=("rows.jsonl", ROWS * 400), purpose="fine-tune").bytes == len(ROWS) * 400


def test_content_is_streamed_as_an_attachment(service: Inside) -> None:
    kept = service.client().files.create(file=("q'uote é.jsonl", ROWS), purpose="fine-tune")
    answer = httpx.get(f"{service.url}/v1/files/{kept.id}/content")
    assert answer.headers["content-disposition"].startswith("attachment; filename*=UTF-8''q%27uote%20%C3%A9")
    assert answer.headers["x-content-type-options"] == "nosniff"
    service.client().files.delete(kept.id)
