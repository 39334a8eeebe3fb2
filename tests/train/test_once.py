"""Runs made of several, which were killed at their end."""

from __future__ import annotations

from pathlib import Path

import pytest

from ift_peft.errors import RunError
from ift_peft.run_dir import RunDir
from ift_peft.train.once import unfinished


def test_a_run_of_several_that_lacks_its_report_is_gone_on_with(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write("manifest.json", {"status": "succeeded", "kind": "pipeline", "parts": {}})
    assert unfinished(run) == run
    (tmp_path / "report.html").write_text("", "utf-8")
    with pytest.raises(RunError, match="has succeeded"):
        unfinished(run)
