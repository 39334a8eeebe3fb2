"""A service with a key and nothing in it: signing in, what to do next, and its end while a page follows a job."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from ift_peft.serve.security.keys import create_key
from tests.serve.conftest import Server
from tests.serve.pages import data
from tests.serve.pages.conftest import Browse

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """The server, and its only key."""
    folder = tmp_path_factory.mktemp("locked") / "data"
    folder.mkdir()
    server = Server(folder).start()
    _, key = create_key(data.store_of(folder), "a browser", scopes=["read", "write"])
    yield server, key
    server.stop()
    assert "Traceback" not in server.log, server.log


def test_a_browser_signs_in_with_a_key_and_out_again(locked: tuple[Server, str], browse: Browse) -> None:
    server, key = locked
    with browse(url=server.url, java_script_enabled=False, expected=("status of 403",)) as tab:
        tab.open("/start")
        assert tab.page.url.endswith("/login")
        tab.page.get_by_label("API key").fill("sk-ift-wrong")
        tab.page.get_by_role("button", name="Sign in").click()
        assert "not valid" in tab.page.get_by_role("alert").inner_text()
        assert tab.page.get_by_label("API key").input_value() == ""
        tab.page.get_by_label("API key").fill(key)
        tab.page.get_by_role("button", name="Sign in").click()
        tab.page.wait_for_url(f"{server.url}/")
        (cookie,) = tab.page.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        assert key not in cookie["value"]

        assert "No jobs yet" in tab.page.locator("main").inner_text()
        code = tab.page.locator("pre").inner_text()
        assert code.count("\n") == 4
        assert f'base_url="{server.url}/v1"' in code
        for path, told in (("/files", "No files yet"), ("/start", "nothing to train on"), ("/playground", "No tuned")):
            tab.open(path)
            assert told in tab.page.locator("main").inner_text()
            assert tab.page.locator("pre").count() == 1

        tab.page.get_by_role("button", name="Sign out").click()
        tab.page.wait_for_url("**/login")
        assert tab.page.context.cookies() == []
    assert httpx.get(server.url, cookies={cookie["name"]: cookie["value"]}).status_code in (303, 401)


def test_a_form_that_does_not_say_where_it_is_from_is_refused(locked: tuple[Server, str]) -> None:
    server, key = locked
    own = {"Origin": server.url}
    signed_in = httpx.post(f"{server.url}/login", data={"key": key}, headers=own)
    assert signed_in.status_code == 303
    cookies = dict(signed_in.cookies)
    for headers, status in (
        ({}, 403),
        ({"Origin": "http://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Referer": "http://elsewhere.example/start"}, 403),
        ({"Referer": f"{server.url}/start"}, 400),  # let in: it is what it asks for that is wrong
        (own, 400),
    ):
        form = {"model": "tiny", "training_file": "file-none"}
        answer = httpx.post(f"{server.url}/start", data=form, headers=headers, cookies=cookies)
        assert answer.status_code == status, headers


def test_a_form_may_do_no_more_than_its_key_and_says_so_on_its_page(locked: tuple[Server, str]) -> None:
    server, _ = locked
    _, reads = create_key(data.store_of(server.data_dir), "reads", scopes=["read"])
    file_id = data.add_file(server.data_dir, data.conversations(12), "kept.jsonl")
    job_id = data.add_job(server.data_dir, training_file=file_id, status="paused")
    own = {"Origin": server.url}
    cookies = dict(httpx.post(f"{server.url}/login", data={"key": reads}, headers=own).cookies)
    for path in ("/start", f"/jobs/{job_id}/resume", f"/files/{file_id}/delete"):
        answer = httpx.post(server.url + path, data={"model": "tiny"}, headers=own, cookies=cookies)
        assert (answer.status_code, answer.headers["content-type"][:9]) == (403, "text/html")
        assert "lacks a scope" in answer.text
    assert "paused" in httpx.get(f"{server.url}/jobs/{job_id}", cookies=cookies).text
    assert (server.data_dir / "files" / file_id).is_file()


def test_a_page_that_follows_a_job_does_not_keep_the_service_from_ending(locked: tuple[Server, str]) -> None:
    server, key = locked
    job_id = data.add_job(server.data_dir, training_file="file-none")
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.stream("GET", f"{server.url}/jobs/{job_id}/stream", headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        while not next(lines).startswith("data:"):
            pass
        assert server.process is not None
        server.process.terminate()
        assert not [line for line in lines if line.startswith("data:")]  # it ends, and whole
    server.process.wait(60)
    assert "timeout graceful shutdown exceeded" not in server.log
