"""`ift verify-resume`, whole: killed and gone on with, against never stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import OFFLINE, ROOT, Ift
from tests.faults.conftest import Observed
from tests.train.small import write_small


@pytest.mark.fault(
    "checkpoints",
    "ift verify-resume: two kill -9s of the command line, one of them while a checkpoint is written",
    expected="losses, weights, rows and scores are those of a run that nobody killed",
    rare=True,
)
def test_the_proof_of_a_users_own_recipe(
    tmp_path: Path, ift: Ift, monkeypatch: pytest.MonkeyPatch, observed: Observed
) -> None:
    write_small(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{OFFLINE}{os.pathsep}{ROOT}")
    done = ift("verify-resume", "small.yaml", "--kills", "2", "--steps", "10", "--seed", "1")
    assert done.returncode == 0, done.stderr
    for what in ("losses of 10 steps", "weights, bit by bit", "rows and their order", "scores"):
        assert f"{what:<24} equal" in done.stdout
    result = json.loads((tmp_path / "runs" / "small" / "verify-resume.json").read_text("utf-8"))
    assert result["equal"]
    assert len(result["kills"]) == 2
    assert result["kills"][1]["writing"]  # every second one
    assert [path.name for path in (tmp_path / "runs" / "small").iterdir()] == ["verify-resume.json"]
    observed(f"{len(result['kills'])} kills, one in a save; all four equal")
