"""Pages under load and under attack, of a service in this process: what one of them does must not stop the others."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from sqlalchemy import update

from ift_peft.serve.operations.logs import JsonLines
from ift_peft.serve.pages import live
from ift_peft.serve.pages import look as looking
from ift_peft.serve.security.keys import create_key, revoke_key
from ift_peft.serve.security.sessions import COOKIE, sign_in, sign_out
from ift_peft.serve.settings import Limits
from ift_peft.serve.store.tables import files
from tests.serve.inside import Inside, serving, wait_for
from tests.serve.pages import data
from tests.serve.test_files import ROWS
from tests.serve.test_security import fails

pytestmark = pytest.mark.slow

HTML = {"Accept": "text/html"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    limits = Limits(sweep_seconds=0.05, requests_per_minute=100_000)
    with serving(tmp_path_factory.mktemp("pages") / "data", limits=limits) as running:
        yield running


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Looks that say when they have read a file, and end when they are let."""
    begun, let, look = threading.Event(), threading.Event(), looking.look

    def waiting(path: Path) -> looking.Look:
        found = look(path)
        begun.set()
        assert let.wait(30)
        return found

    monkeypatch.setattr(looking, "look", waiting)
    yield begun, let
    let.set()


def uploaded(service: Inside) -> str:
    return service.client().files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id


def test_pages_that_wait_for_a_look_keep_nobody_from_being_answered(
    service: Inside, slow: tuple[threading.Event, threading.Event]
) -> None:
    begun, let = slow
    kept = uploaded(service)
    limits = httpx.Limits(max_connections=60)
    with ThreadPoolExecutor(45) as threads, service.http(limits=limits) as http:
        pages = [threads.submit(http.get, f"/files/{kept}") for _ in range(45)]
        try:
            assert begun.wait(20)
            time.sleep(0.3)  # for the others to arrive
            assert http.get("/v1/files", timeout=5).status_code == 200
            assert not any(page.done() for page in pages)
        finally:
            let.set()
        assert [page.result().status_code for page in pages] == [200] * 45


@pytest.mark.parametrize("expired", [False, True])
def test_a_look_at_a_file_that_is_deleted_meanwhile_is_not_remembered(
    service: Inside, slow: tuple[threading.Event, threading.Event], expired: bool
) -> None:
    begun, let = slow
    kept = uploaded(service)
    with ThreadPoolExecutor(1) as threads, service.http() as http:
        page = threads.submit(http.get, f"/files/{kept}")
        assert begun.wait(20)
        if expired:
            with service.service.store.begin() as connection:
                connection.execute(update(files).where(files.c.id == kept).values(expires_at=1))
            wait_for(lambda: not (service.data_dir / "files" / kept).exists())
            wait_for(lambda: service.service.looks._looking is None)
        else:
            service.client().files.delete(kept)
        let.set()
        assert page.result().status_code == 200
    assert service.service.looks.known(kept) is None


def test_people_are_told_on_a_page_why_they_are_not_let_in(tmp_path: Path) -> None:
    with serving(tmp_path / "data", limits=Limits(requests_per_minute=12)) as running, running.http() as http:
        key = create_key(running.service.store, "chats", scopes=["inference"])[1]
        own = {**HTML, "Origin": running.url}
        asked = [
            (http.get("/files", headers=HTML), 303),
            (http.post("/start", headers=own), 303),
            (http.get("/files", headers={**HTML, "Authorization": f"Bearer {key}"}), 403),
            (http.post("/start", headers={**HTML, "Origin": "http://evil.example"}), 403),
            (http.get("/files", headers={**HTML, "Host": "http://[<b>"}), 421),
            *[(http.post("/login", headers=own, data={"key": ""}), 403) for _ in range(12)],
            (http.post("/login", headers=own, data={"key": ""}), 429),
        ]
        for answer, status in asked:
            assert answer.status_code == status
            if status == 303:
                assert answer.headers["location"] == "/login"
            else:
                assert answer.headers["content-type"].startswith("text/html")
                assert "default-src 'self'" in answer.headers["content-security-policy"]
                assert "<b>" not in answer.text
        assert int(asked[-1][0].headers["retry-after"]) >= 1
        assert http.get("/v1/files", headers=HTML).json()["error"]["code"]


def test_a_look_reads_a_file_as_the_upload_did_and_counts_all_faults(
    service: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service.http() as http:
        for begun in (b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"):
            kept = service.client().files.create(file=("rows.jsonl", begun + ROWS), purpose="fine-tune").id
            assert "cannot be used" not in http.get(f"/files/{kept}").text
        for limit, told in ((100_000, "25 rows cannot be used, the first of them:"), (63, "At least 21 rows cannot")):
            kept = uploaded(service)  # and spoilt afterwards, as no upload lets them in
            (service.data_dir / "files" / kept).write_bytes(b"[]\n" * 25)
            monkeypatch.setattr(looking, "MOST_BYTES", limit)
            text = http.get(f"/files/{kept}").text
            assert told in text
            assert text.count("expected one JSON object a line") == looking.SHOWN_FAULTS


def test_what_fails_is_logged_once_and_by_its_route(
    service: Inside, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ift_peft.serve")
    monkeypatch.setattr("ift_peft.serve.pages.files.find_file", fails)
    monkeypatch.setattr("ift_peft.serve.routes.files.find_file", fails)
    with service.http() as http:
        for path, route in (("/files/PATHTEXT", "/files/{file_id}"), ("/v1/files/PATHTEXT", "/v1/files/{file_id}")):
            caplog.clear()
            answer = http.get(path)
            assert answer.status_code == 500
            assert answer.headers["referrer-policy"] == "same-origin"
            assert answer.headers["cache-control"] == "no-store"
            wait_for(lambda route=route: route in [vars(one).get("route") for one in caplog.records])
            assert len([one for one in caplog.records if one.levelno >= logging.ERROR]) == 1
            assert not [one for one in caplog.records if "PATHTEXT" in JsonLines().format(one)]


@pytest.mark.parametrize("how", ["revoked", "signed out", "first key"])
def test_a_stream_ends_with_the_right_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(live, "EVERY", 0.02)
    monkeypatch.setattr(live, "CHECKED_AGAIN", 0.05)
    with serving(tmp_path / "data") as running:
        store, headers = running.service.store, {}
        job_id = data.add_job(running.data_dir, training_file="file-none")
        if how != "first key":
            key_id, key = create_key(store, "one", scopes=["read"])
            session = sign_in(store, key)
            assert session is not None
            signed_in = {"Cookie": f"{COOKIE}={session.secret}"}
            headers = signed_in if how == "signed out" else {"Authorization": f"Bearer {key}"}
        with running.http(headers=headers) as http, http.stream("GET", f"/jobs/{job_id}/stream") as answer:
            lines = answer.iter_lines()
            while not next(lines).startswith("data:"):
                pass
            time.sleep(0.2)
            assert running.service.streams.open == 1, "who may follow goes on doing so"
            if how == "first key":
                create_key(store, "one", scopes=["read"])
            elif how == "revoked":
                revoke_key(store, key_id)
            else:
                sign_out(store, session.secret)
            assert not [line for line in lines if line.startswith("data:")]
        wait_for(lambda: running.service.streams.open == 0)


@pytest.mark.parametrize("given", ["9" * 5_000, "٣", "-1", "x"])
def test_a_last_event_that_is_no_number_is_passed_over(service: Inside, given: str) -> None:
    job_id = data.add_job(service.data_dir, training_file="file-none", status="failed")
    data.tell(service.data_dir, job_id, "it is told")
    headers = [(b"Last-Event-ID", given.encode())]
    with service.http() as http:
        answer = http.get(f"/jobs/{job_id}/stream", headers=headers)
    assert answer.status_code == 200 and "it is told" in answer.text


def test_a_file_that_has_expired_is_forgotten_with_what_was_seen_of_it(service: Inside) -> None:
    kept = uploaded(service)
    with service.http() as http:
        assert http.get(f"/files/{kept}").status_code == 200
    assert service.service.looks.known(kept) is not None
    with service.service.store.begin() as connection:
        connection.execute(update(files).where(files.c.id == kept).values(expires_at=1))
    wait_for(lambda: kept not in service.service.looks._seen)
