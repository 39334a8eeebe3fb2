"""The report that a run ends in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ift_peft.run_dir import RunDir
from tests.conftest import Ift
from tests.report.browser import check, looks

pytestmark = pytest.mark.slow


def test_a_run_ends_in_a_report_that_a_browser_shows_whole(short_run: RunDir, printed: str, tmp_path: Path) -> None:
    page = short_run.path / "report.html"
    assert "report.html" in printed
    sections = ["scores", "classes", "calibration", "unseen", "perturbed", "forgetting", "rows", "trained", "cost"]
    check(looks(page, tmp_path), page, sections=[*sections, "mask", "provenance"])


def test_the_command_writes_the_same_page_without_torch(short_run: RunDir, ift: Ift, tmp_path: Path) -> None:
    done = ift("report", str(short_run.path), "--output", "again.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again.html").read_text("utf-8") == (short_run.path / "report.html").read_text("utf-8")


def test_the_page_supervises_what_was_answered_and_names_no_folder(short_run: RunDir) -> None:
    page = (short_run.path / "report.html").read_text("utf-8")
    answer = short_run.read("golden.json")["messages"][-1]["content"]
    marked = "".join(piece.split("</mark>")[0] for piece in page.split("<mark>")[1:])
    assert marked == f"{answer}&lt;|end|&gt;"
    for folder in (short_run.path.parent.parent.parent, Path(__file__).parent.parent.parent, Path(sys.prefix)):
        assert str(folder) not in page
