"""The dashboard as people meet it: by clicks and keys in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.browse import LOOK
from tests.report.browser import CONTRAST
from tests.serve.pages import data
from tests.serve.pages.conftest import TUNED, Board, Browse, until

pytestmark = pytest.mark.slow
POINTS = "document.querySelector('#curves polyline').getAttribute('points').split(' ').length"


@pytest.mark.parametrize(("scheme", "width"), [("light", 360), ("dark", 1200)])
def test_every_page_is_readable_and_within_its_window(
    board: Board, browse: Browse, artefacts: Path, scheme: str, width: int
) -> None:
    with browse(color_scheme=scheme, viewport={"width": width, "height": 800}) as tab:
        for name, path in board.pages.items():
            assert tab.open(path).status == 200
            tab.page.screenshot(path=artefacts / f"{name}-{scheme}-{width}.png", full_page=True)
            look = tab.page.evaluate(LOOK)
            assert look["overflow"] == 0, name
            assert look["worst"]["contrast"] >= CONTRAST, (name, look["worst"])
            assert (look["unscoped"], look["unnamed"], look["outside"]) == (0, 0, 0), name
            assert look["levels"][0] == 1, name
            assert all(after <= before + 1 for before, after in zip(look["levels"], look["levels"][1:], strict=False))
            assert (sum(look["background"][:3]) / 3 > 128) is (scheme == "light"), name
            unlabelled = "e => e.filter(one => one.type !== 'hidden' && !one.hidden && !one.labels.length).length"
            assert tab.page.eval_on_selector_all("input, select, textarea", unlabelled) == 0, name


def test_the_curve_grows_while_the_page_is_open_and_ends_with_the_scores(board: Board, browse: Browse) -> None:
    job_id = data.add_job(board.data_dir, suffix="growing", training_file=board.file)
    for step, loss in data.losses(range(1, 11)):
        data.tell_step(board.data_dir, job_id, step, loss)
    with browse() as tab:
        tab.open(f"/jobs/{job_id}")
        assert tab.page.evaluate(POINTS) == 10
        tab.page.get_by_text("Pause", exact=True).focus()
        for step, loss in data.losses(range(11, 31)):
            data.tell_step(board.data_dir, job_id, step, loss)
        data.tell(board.data_dir, job_id, f"a note {data.PLANTED}")
        until(tab, lambda: tab.page.evaluate(POINTS) == 30)
        assert tab.page.get_by_text("step 30 of 120").is_visible()
        assert tab.page.get_by_text(f"a note {data.PLANTED}").is_visible()
        assert tab.page.evaluate("document.activeElement.textContent") == "Pause"  # what did not change is left alone

        run = data.copy_run(board.run, board.data_dir, job_id)
        data.change_job(board.data_dir, job_id, status="succeeded", run=str(run.path.relative_to(board.data_dir)))
        tab.page.locator("#status", has_text="succeeded").wait_for()
        assert tab.page.locator("#outcome").get_by_text("held-out rows").is_visible()
        assert tab.page.locator("#scores tbody tr").count() >= 2
        assert tab.page.locator("#actions button").count() == 0
        assert tab.page.evaluate("document.activeElement.id") == "actions"  # the button is gone, the place is kept
        tab.page.wait_for_timeout(2500)  # longer than it waits before it connects again
        assert sum("/stream" in one for one in tab.requests) == 1


def test_without_the_script_pages_say_the_same(board: Board, browse: Browse) -> None:
    with browse(java_script_enabled=False) as tab:
        tab.open("/")
        tab.page.get_by_role("link", name="reviews", exact=True).click()
        assert len(tab.page.locator("#curves polyline").first.get_attribute("points").split()) == 60
        assert tab.page.locator("#outcome").get_by_text("held-out rows").is_visible()
        assert tab.page.get_by_text(TUNED).first.is_visible()
        assert not any("/stream" in one for one in tab.requests)


def test_markup_from_others_is_text_everywhere(board: Board, browse: Browse) -> None:
    with browse() as tab:
        for path in (*board.pages.values(), f"/jobs/{board.failed}", f"/start?training_file={board.marked_file}"):
            tab.open(path)
            assert tab.page.locator("main script, main img").count() == 0, path
        tab.open(f"/jobs/{board.failed}")
        assert tab.page.get_by_role("heading", level=1).inner_text() == data.PLANTED
        assert tab.page.locator(".events td").last.inner_text() == data.PLANTED
        tab.open(f"/files/{board.marked_file}")
        assert tab.page.get_by_role("heading", level=1).inner_text() == f"{data.PLANTED}.jsonl"
        assert tab.page.locator("[lang=zh]").count() > 0


def test_the_report_is_shown_in_a_sandbox(board: Board, browse: Browse) -> None:
    with browse() as tab:
        tab.open(f"/jobs/{board.done}")
        tab.page.get_by_role("link", name="Report of the run").click()
        tab.page.wait_for_url("**/report")
        assert tab.page.locator("h1").inner_text() == board.done
        assert tab.page.evaluate("getComputedStyle(document.querySelector('section')).borderTopStyle") == "solid"
        assert tab.page.evaluate("window.origin") == "null"


def test_what_moves_stands_still_for_those_who_ask_for_it(board: Board, browse: Browse) -> None:
    moving = "getComputedStyle(document.querySelector('#status .dot')).animationName"
    found = []
    for motion in ("no-preference", "reduce"):
        with browse(reduced_motion=motion) as tab:
            tab.open(f"/jobs/{board.running}")
            found.append(tab.page.evaluate(moving))
    assert found == ["breathe", "none"]
