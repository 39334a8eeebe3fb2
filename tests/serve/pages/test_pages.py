"""What pages are made of: errors in words, policies, colours, looks at files, the body that a form makes."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from ift_peft.serve.pages import look as looking
from ift_peft.serve.pages.job_view import run_of, state_of
from ift_peft.serve.pages.jobs import wanted
from ift_peft.serve.pages.look import Looks, look
from ift_peft.serve.pages.templates import REPORT, in_bytes, lasting
from ift_peft.serve.service import Service
from ift_peft.serve.settings import Settings
from tests.report.browser import CONTRAST
from tests.serve.pages import data
from tests.serve.pages.conftest import Board
from tests.serve.pages.test_live import in_a_thread


@pytest.mark.slow
def test_pages_may_load_nothing_from_elsewhere_and_run_nothing_that_is_written_into_them(board: Board) -> None:
    for path in board.pages.values():
        answer = httpx.get(board.url + path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["referrer-policy"] == "same-origin"
        written = r"<script(?![^>]*\bsrc=)|<style|<\w[^<>]*\s(style|on\w+)="
        assert not re.search(written, answer.text), path
        assert re.findall(r'<html[^>]*lang="en"', answer.text)
    report = httpx.get(f"{board.url}/jobs/{board.done}/report")
    assert report.headers["content-security-policy"].startswith("sandbox; default-src 'none'")


@pytest.mark.slow
def test_what_goes_wrong_is_told_on_a_page_with_what_to_do(board: Board) -> None:
    for method, path, status in (
        ("GET", "/jobs/ftjob-none", 404),
        ("GET", f"/jobs/{board.running}/report", 404),
        ("GET", "/files/..%2Fstore.sqlite", 404),
        ("GET", "/?after=ftjob-none", 400),
        ("POST", "/jobs/ftjob-none/cancel", 404),
        ("POST", f"/jobs/{board.done}/destroy", 404),
        ("POST", "/files/file-none/delete", 404),
    ):
        answer = httpx.request(method, board.url + path)
        if path.startswith("/files/.."):
            assert answer.status_code == status
            continue
        assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html; charset=utf-8"), path
        assert re.search(r'role="alert"><p>[^<]+</p><p class="muted">[^<]+</p>', answer.text), path
    elsewhere = {"Origin": "http://elsewhere.example"}
    assert httpx.post(f"{board.url}/jobs/{board.running}/cancel", headers=elsewhere).status_code == 403
    assert httpx.get(f"{board.url}/v1/fine_tuning/jobs/{board.running}").json()["status"] == "running"


@pytest.mark.slow
def test_what_pages_load_is_kept_by_its_content(board: Board) -> None:
    text = httpx.get(board.url).text
    for address in re.findall(r'(?:href|src)="(/static/[^"]+)"', text):
        assert "immutable" in httpx.get(board.url + address).headers["cache-control"]
        assert httpx.get(board.url + address.partition("?")[0]).headers["cache-control"] == "no-cache"
    assert httpx.get(f"{board.url}/static/page.py").status_code == 404


def test_text_stands_out_from_what_is_behind_it_in_both_schemes() -> None:
    style = (REPORT / "report.css").read_text("utf-8")
    light, dark = (
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)[:2]
    )
    assert set(light) == set(dark) > {"paper", "ink", "muted", "base", "adapter", "bad", "faint"}
    for colours in (light, dark):
        on_paper = [(colours[name], colours["paper"]) for name in ("ink", "muted", "base", "adapter", "bad")]
        for text, behind in (*on_paper, (colours["ink"], colours["faint"])):
            assert contrast(text, behind) >= CONTRAST
    assert contrast("#ffffff", "#000000") == pytest.approx(21)


def contrast(one: str, other: str) -> float:
    """Of two colours, by WCAG 2.2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_look_at_a_file_finds_copies_classes_and_rows_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    rows = data.conversations(40)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join([*lines, "{", '{"messages": []}', '"text"']) + "\n", "utf-8")
    found = look(path)
    assert (found.rows, found.more, len(found.faults)) == (40, False, 3)
    assert [(name.text, count, share) for name, count, share in found.classes] == [
        ("退款", 20, 0.5),
        ("delivery", 20, 0.5),
    ]
    copies = next(one for one in found.findings if one.kind == "exact_duplicates")
    assert (copies.count, copies.examples[0].why) == (2, "the same as line 1")
    assert found.answers is not None
    assert (found.answers.shortest, found.answers.median, found.answers.longest) == (2, 5, 8)
    assert "line 41" in found.faults[0]


def test_answers_of_their_own_are_no_classes_and_a_large_file_is_looked_at_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows"
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": f"a{n}"}) + "\n" for n in range(30)), "utf-8")
    monkeypatch.setattr(looking, "MOST_ROWS", 20)
    looks = Looks()
    found = in_a_thread(looks.look, "file-a", path)
    assert (found.rows, found.more, found.classes) == (20, True, ())
    path.unlink()
    assert in_a_thread(looks.look, "file-a", path) is found  # remembered
    looks.forget("file-a")
    assert looks.known("file-a") is None
    with pytest.raises(OSError):
        in_a_thread(looks.look, "file-a", path)
    path.write_text('{"prompt": "q", "completion": "a"}\n', "utf-8")
    in_a_thread(partial(looks.look, until=1.0), "file-b", path)
    assert looks.known("file-b") is None  # its time is over


def test_a_look_reads_no_more_bytes_than_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows"
    line = json.dumps({"prompt": "q", "completion": "a" * 100}) + "\n"
    path.write_text(line * 30, "utf-8")
    monkeypatch.setattr(looking, "MOST_BYTES", 7 * len(line))
    assert (look(path).rows, look(path).more) == (7, True)
    monkeypatch.setattr(looking, "MOST_BYTES", 7 * len(line) + 5)
    assert (look(path).rows, look(path).faults) == (7, ()), "no half of a line"
    monkeypatch.setattr(looking, "MOST_BYTES", 30 * len(line))
    assert (look(path).rows, look(path).more) == (30, False)


@pytest.mark.parametrize(
    ("given", "body"),
    [
        ({"model": "tiny", "training_file": "f", "n_epochs": "", "once": "x"}, {"model": "tiny", "training_file": "f"}),
        (
            {"n_epochs": "3", "learning_rate_multiplier": "0.5"},
            {"n_epochs": 3, "learning_rate_multiplier": 0.5},
        ),
        ({"batch_size": "many"}, {"batch_size": "many"}),  # for the API to refuse
        ({"r": "8", "seed": "1"}, {"recipe": {"adapter": {"r": 8}}, "seed": 1}),
    ],
)
def test_a_form_becomes_the_body_that_a_client_would_send(given: dict[str, str], body: dict[str, Any]) -> None:
    hyperparameters = {key: value for key, value in body.items() if key in ("n_epochs", "batch_size")}
    hyperparameters |= {key: value for key, value in body.items() if key == "learning_rate_multiplier"}
    expected = {key: value for key, value in body.items() if key not in hyperparameters}
    if hyperparameters:
        expected["method"] = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    assert wanted(given) == expected


def test_a_run_is_looked_for_below_the_data_folder_only(tmp_path: Path) -> None:
    service = Service(Settings(data_dir=tmp_path / "data"))
    try:
        for place in (tmp_path / "elsewhere", tmp_path / "data" / "runs" / "one"):
            place.mkdir(parents=True)
            (place / "manifest.json").write_text("{}", "utf-8")
        assert run_of(service, {"run": "../elsewhere"}) is None  # type: ignore[arg-type]
        assert run_of(service, {"run": None}) is None  # type: ignore[arg-type]
        assert run_of(service, {"run": "runs/one"}) is not None  # type: ignore[arg-type]
    finally:
        service.store.close()
        service._lock.close()


def test_how_far_a_job_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0)
    job: Any = {"status": "running", "estimated_finish": 1125, "finished_at": None, "started_at": 900}
    state = state_of(job, {"step": 30, "total_steps": 120})
    assert (state.progress, state.share, state.final) == ("step 30 of 120, about 2 min 5 s left", 0.25, False)
    state = state_of({**job, "status": "cancelled", "finished_at": 4500}, {"step": 30})
    assert (state.progress, state.actions, state.final) == ("step 30, took 1 h", (), True)


def test_times_and_sizes_are_in_words() -> None:
    assert [lasting(seconds) for seconds in (0, 59.6, 61, 3600, 90061)] == [
        "0 s",
        "1 min",
        "1 min 1 s",
        "1 h",
        "1 d 1 h",
    ]
    assert [in_bytes(size) for size in (0, 999, 1500, 123_456, 5 * 10**9)] == [
        *("0 bytes", "999 bytes", "1.5 kB", "123 kB", "5.0 GB"),
    ]
