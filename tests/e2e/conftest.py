"""One short run over the built-in base, shared by the tests that look at what a run leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ift_peft.recipe import load_recipe
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir, open_run
from ift_peft.train.run import train
from tests.conftest import OFFLINE, ROOT

SHORT = (
    "base.device=cpu",
    "data.max_train_rows=160",
    "data.max_test_rows=60",
    "evaluation.max_unseen_rows=4",
    "training.num_train_epochs=1",
)


FEW_OF_EACH = (
    "base.device=cpu",
    "data.max_train_rows=96",
    "data.max_test_rows=60",
    "training.max_steps=8",
    "training.per_device_train_batch_size=8",
    "evaluation.bootstrap_samples=200",
    "evaluation.forgetting=false",
    "evaluation.max_new_tokens=8",
)


@pytest.fixture(scope="session")
def mixed_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The recipe `multitask` for eight steps."""
    folder = tmp_path_factory.mktemp("mixed")
    return train(load_recipe("multitask", FEW_OF_EACH), root=folder / "runs", reporter=Silent())


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """`ift train sentiment` on 160 rows over NF4, in a fresh process without network."""
    folder = tmp_path_factory.mktemp("short")
    finished = subprocess.run(
        [sys.executable, "-m", "ift_peft", "train", "sentiment", *SHORT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{OFFLINE}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    (folder / "stdout").write_text(finished.stdout, "utf-8")
    (folder / "stderr").write_text(finished.stderr, "utf-8")
    return open_run(folder / "runs" / "sentiment" / "latest")


@pytest.fixture(scope="session")
def printed(short_run: RunDir) -> str:
    folder: Path = short_run.path.parent.parent.parent
    return (folder / "stdout").read_text("utf-8") + (folder / "stderr").read_text("utf-8")
