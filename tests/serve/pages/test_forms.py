"""What the forms of the dashboard do, with a keyboard, with a mouse, and without the script."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.serve.pages import data
from tests.serve.pages.conftest import TUNED, Board, Browse, Tab, until

pytestmark = pytest.mark.slow
REFUSED = "Failed to load resource: the server responded with a status of 4"


def tab_to(tab: Tab, name: str) -> None:
    """Press the tabulator until the element called `name` has the focus, which is to be seen."""
    own = "(e => e.labels?.[0]?.textContent ?? e.textContent)(document.activeElement).trim()"
    for _ in range(40):
        tab.page.keyboard.press("Tab")
        if tab.page.evaluate(own) == name:
            assert tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            return
    raise AssertionError(f"no way to {name}")


def test_a_job_is_started_with_the_keyboard_alone_and_then_paused_resumed_and_cancelled(
    board: Board, browse: Browse
) -> None:
    with browse(expected=(REFUSED,)) as tab:
        tab.open("/")
        tab.page.keyboard.press("Tab")
        assert tab.page.evaluate("document.activeElement.textContent") == "Skip to the content"
        tab_to(tab, "Start a job")
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_url("**/start")
        tab_to(tab, "Training file")
        tab.page.keyboard.type("support")
        tab_to(tab, "Suffix")
        tab.page.keyboard.type("by-keys")
        tab_to(tab, "Epochs")
        tab.page.keyboard.type("1000")
        tab_to(tab, "LoRA r")
        tab.page.keyboard.type("4")
        tab.page.keyboard.press("Enter")
        alert = tab.page.get_by_role("alert")
        assert "n_epochs" in alert.inner_text()  # refused as the API refuses it, at its field, and nothing is lost
        field = tab.page.get_by_label("Epochs")
        assert field.get_attribute("aria-invalid") == "true"
        assert tab.page.get_by_label("Suffix").input_value() == "by-keys"
        field.fill("1")
        field.press("Enter")
        tab.page.wait_for_url("**/jobs/ftjob-*")
        job_id = tab.page.url.rpartition("/")[2]
        assert tab.page.get_by_role("heading", level=1).inner_text() == "by-keys"
    job = httpx.get(f"{board.url}/v1/fine_tuning/jobs/{job_id}").json()
    assert (job["training_file"], job["hyperparameters"]["n_epochs"]) == (board.file, 1)
    with browse(java_script_enabled=False, expected=(REFUSED,)) as tab:
        tab.open(f"/jobs/{job_id}")
        assert tab.page.get_by_text("r 4").is_visible()
        status = tab.page.locator("#status")
        for button, becomes in (("Pause", ("paused",)), ("Resume", ("queued", "validating files", "running"))):
            tab.page.get_by_role("button", name=button, exact=True).click()
            assert status.inner_text().strip() in becomes
        tab.page.get_by_text("Cancel…").click()
        with httpx.Client(base_url=board.url) as client:  # by somebody else, meanwhile
            assert client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").json()["status"] == "cancelled"
        tab.page.get_by_role("button", name="Cancel this job").click()
        assert "cancelled" in tab.page.get_by_role("alert").inner_text()
        assert status.inner_text().strip() == "cancelled"
        assert tab.page.locator("#actions button").count() == 0


def test_sending_the_form_twice_makes_one_job(board: Board) -> None:
    form = {"model": "tiny", "training_file": board.file, "suffix": "twice", "n_epochs": "1", "once": "a" * 32}
    places = [httpx.post(f"{board.url}/start", data=form).headers["location"] for _ in range(2)]
    assert places[0] == places[1]
    assert httpx.post(f"{board.url}{places[0]}/cancel").status_code == 303


@pytest.mark.parametrize("script", [True, False])
def test_base_and_adapter_answer_side_by_side(board: Board, browse: Browse, script: bool) -> None:
    prompt = "这家店的面很好吃。How was it?"
    wanted = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_completion_tokens": 256}
    told = {}
    for who, model in (("base", "tiny"), ("adapter", TUNED)):
        answer = httpx.post(f"{board.url}/v1/chat/completions", json={**wanted, "model": model}, timeout=120)
        told[who] = answer.json()["choices"][0]["message"]["content"]
    with browse(java_script_enabled=script) as tab:
        tab.open("/")
        tab.page.get_by_role("link", name=f"{TUNED} in the playground").click()
        assert tab.page.get_by_label("Tuned model").input_value() == TUNED
        tab.page.get_by_label("Prompt", exact=True).fill(prompt)
        tab.page.get_by_role("button", name="Ask both").click()
        for who, text in told.items():
            if script:
                until(tab, lambda who=who, text=text: tab.page.locator(f"#{who}").text_content() == text)
            assert tab.page.locator(f"#{who}").text_content() == text
        assert any("/v1/chat/completions" in one for one in tab.requests) is script


def test_an_error_of_the_playground_is_told_where_the_answer_would_be(board: Board, browse: Browse) -> None:
    prompt = "word " * 5000
    asked = {"model": "tiny", "messages": [{"role": "user", "content": prompt}]}
    said = httpx.post(f"{board.url}/v1/chat/completions", json=asked, timeout=60).json()["error"]["message"]
    with browse(expected=(REFUSED,)) as tab:
        tab.open("/playground")
        tab.page.get_by_label("Prompt", exact=True).fill(prompt)
        tab.page.get_by_role("button", name="Ask both").click()
        until(tab, lambda: said in (tab.page.locator("#base").text_content() or ""))


def test_a_file_is_uploaded_looked_at_and_deleted_without_the_script(
    board: Board, browse: Browse, tmp_path: Path
) -> None:
    rows = tmp_path / "<b>new<b>.jsonl"
    rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data.conversations(24)), "utf-8")
    broken = tmp_path / "broken.jsonl"
    broken.write_text("not JSON\n" * 12, "utf-8")
    with browse(java_script_enabled=False, expected=(REFUSED,)) as tab:
        tab.open("/files")
        tab.page.get_by_label("Rows to train on").set_input_files(broken)
        tab.page.get_by_role("button", name="Upload").click()
        assert "line 1" in tab.page.get_by_role("alert").inner_text().lower()
        tab.page.get_by_label("Rows to train on").set_input_files(rows)
        tab.page.get_by_role("button", name="Upload").click()
        tab.page.wait_for_url("**/files/file-*")
        assert tab.page.get_by_text("24 rows").is_visible()
        assert tab.page.get_by_text("exact duplicates, 2 rows").is_visible()
        assert tab.page.locator("td", has_text="the same as line 1").count() >= 1
        file_id = tab.page.url.rpartition("/")[2]
        tab.page.get_by_text("Delete…").click()
        tab.page.get_by_role("button", name="Delete this file").click()
        tab.page.wait_for_url("**/files")
        assert tab.open(f"/files/{file_id}").status == 404
        assert tab.page.get_by_text("It may have been deleted").is_visible()
    assert not (board.data_dir / "files" / file_id).exists()
