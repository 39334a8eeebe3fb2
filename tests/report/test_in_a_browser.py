from __future__ import annotations

from pathlib import Path

import pytest

from ift_peft.report.write import write_report
from ift_peft.run_dir import RunDir
from tests.report.browser import check, looks


@pytest.mark.slow
def test_a_page_with_every_section_is_readable_everywhere(full_run: RunDir, tmp_path: Path) -> None:
    page = write_report(full_run, tmp_path / "report.html")
    sections = ["scores", "classes", "calibration", "unseen", "by-source", "safety", "rows", "trained", "cost"]
    check(looks(page, tmp_path), page, sections=[*sections, "findings", "provenance"])


@pytest.mark.slow
def test_the_look_finds_what_it_looks_for(tmp_path: Path) -> None:
    """The checks above can fail: a page with every fault."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><meta name='viewport' content='width=device-width'><body style='color:#999'>"
        "<h1>a</h1><h3>b</h3>"
        "<table><th>c</th></table><svg width='700'><text x='690' y='20' font-size='8'>d</text></svg>"
        "<img src='missing.png' alt=''><script>console.log('e')</script>",
        "utf-8",
    )
    for look in looks(page, tmp_path):
        assert "e" in look["complaints"]
        assert any(url.endswith("missing.png") for url in look["requests"])
        assert look["worst"]["contrast"] < 4.5
        assert (look["unscoped"], look["unnamed"], look["small"]) == (1, 1, 1)
        assert look["levels"] == [1, 3]
        assert (look["overflow"] > 0) == (look["outside"] > 0) == (look["width"] == 360)
        assert sum(look["background"][:3]) == 3 * 255
