"""`ift verify-resume`: that it would see a difference. That it sees none is in tests/faults/test_proof.py."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ift_peft.cli.verify_resume import _require_equal
from ift_peft.errors import RecipeError, TrainingError
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.train import verify_resume as proving
from ift_peft.train.run import train
from ift_peft.train.verify_resume import compare, shortened
from tests.conftest import Ift
from tests.train.small import small, write_small


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("run")
    recipe = shortened(small(folder), steps=6, rows=2)
    assert recipe.training["save_steps"] == 1
    return train(recipe, root=folder / "runs", reporter=Silent())


def test_each_difference_is_seen(run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    assert compare(run, copy, []).equal
    lines = copy.read_lines("metrics.jsonl")
    lines[3]["loss"] += 1e-9
    copy.write_lines("metrics.jsonl", lines)
    assert compare(run, copy, []).first_loss == 4
    weights = load_file(copy.adapter / "adapter_model.safetensors")
    changed = sorted(weights)[0]
    weights[changed] = weights[changed].nextafter(weights[changed] + 1)
    save_file(weights, copy.adapter / "adapter_model.safetensors")
    copy.update_manifest(order_sha256="0" * 64)
    verdict = compare(run, copy, [])
    assert (verdict.tensors, verdict.same_order, verdict.equal) == ([changed], False, False)
    with pytest.raises(TrainingError, match=r"from step 4 on, 1 other tensors, .*, other rows"):
        _require_equal(verdict)
    scores = copy.read("scores.json")
    scores["adapter"]["accuracy"]["value"] += 0.1
    copy.write("scores.json", scores)
    assert not compare(run, copy, []).same_scores


def test_a_proof_of_fewer_than_three_steps_is_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least 3 steps"):
        shortened(small(tmp_path), steps=2, rows=2)


def test_lines_of_validation_are_no_steps(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert proving._last_step(run) == 0
    run.write_lines("metrics.jsonl", [{"step": step, name: 1.0} for step in (1, 2) for name in ("loss", "eval_loss")])
    assert proving._last_step(run) == 2
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert proving._last_step(run) == 2


def test_a_run_that_ends_before_it_is_killed_proves_nothing(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(command: list[str], root: Path) -> subprocess.Popen[bytes]:
        shutil.copytree(run.path.parent, root / "small", symlinks=True, dirs_exist_ok=True)
        process = subprocess.Popen(["true"])
        process.wait()
        return process

    monkeypatch.setattr(proving, "_start", ended)
    with pytest.raises(TrainingError, match=r"expected 2 kills\s+found 0: .*\s+fix --steps with more"):
        proving.verify_resume(small(tmp_path), kills=2, seed=0, folder=tmp_path / "proof", reporter=Silent())


def test_a_signal_ends_the_trainer_as_well(tmp_path: Path, ift: Ift, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def endless(command: list[str], root: Path) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "600"], start_new_session=True))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[0]

    def unheard(*_: object) -> None:
        raise AssertionError("SIGTERM would have ended it at once")

    write_small(tmp_path)
    monkeypatch.setattr(proving, "_start", endless)
    before = signal.signal(signal.SIGTERM, unheard)
    try:
        ended = ift("verify-resume", "small.yaml")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (ended.returncode, started[0].poll()) == (130, -signal.SIGKILL)
    assert not list((tmp_path / "runs" / "small").iterdir())
