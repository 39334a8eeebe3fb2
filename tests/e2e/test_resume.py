"""Stopping and going on: the result is that of a run that was never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ift_peft.errors import RunError
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir, open_run
from ift_peft.train.run import resume
from tests.conftest import OFFLINE, ROOT, Ift

SETTINGS = (
    "base.device=cpu",
    "data.max_train_rows=96",
    "data.max_test_rows=8",
    "evaluation.forgetting=false",
    "evaluation.unseen_instructions=null",
    "evaluation.perturbation=null",
    "training.num_train_epochs=3",
    "training.logging_steps=1",
    "training.per_device_train_batch_size=4",
)


def start(folder: Path) -> subprocess.Popen[str]:
    with (folder / "stderr").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "ift_peft", "train", "sentiment", *SETTINGS],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": f"{OFFLINE}{os.pathsep}{ROOT}"},
            stderr=errors,
            stdout=subprocess.DEVNULL,
            text=True,
        )


def wait_for_steps(process: subprocess.Popen[str], folder: Path, steps: int) -> RunDir:
    while process.poll() is None:
        for path in folder.glob("runs/sentiment/latest/metrics.jsonl"):
            if len(path.read_text("utf-8").splitlines()) >= steps:
                return RunDir(path.parent.resolve())
        time.sleep(0.05)
    raise AssertionError(f"training ended before step {steps}")


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_weights_of_an_uninterrupted_one(tmp_path: Path, ift: Ift) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    uninterrupted = start(whole)
    interrupted = start(cut)
    run = wait_for_steps(interrupted, cut, 28)
    interrupted.send_signal(signal.SIGINT)
    interrupted.wait(timeout=300)
    message = (cut / "stderr").read_text("utf-8")
    assert interrupted.returncode == 130, message
    assert "ift train --resume" in message
    assert run.status == "interrupted"
    assert not run.adapter.exists()
    refused = ift("predict", str(run.path), "好", cwd=cut)
    assert refused.returncode == 5
    resumed = ift("train", "--resume", str(run.path), cwd=cut)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from checkpoint-" in resumed.stderr
    assert uninterrupted.wait(timeout=300) == 0
    ours = load_file(run.adapter / "adapter_model.safetensors")
    theirs = load_file(open_run(whole / "runs/sentiment/latest").adapter / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    with pytest.raises(RunError, match="has succeeded"):
        resume(run, reporter=Silent())
