"""Fixtures shared by all tests. Sockets other than loopback are refused, here and in every subprocess of a test."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
# Files whose tests share runs that take seconds to train: each group is for one worker. Of pytest-xdist's own marks for
# this, pytest 9.2 makes nothing: it no longer lets a plugin change the ids of tests.
SHARING = {
    "adapters": ("test_combine", "test_ensemble", "test_export", "test_gguf_file"),
    "planted": ("test_planted_merges",),
    "classifier": ("test_classifier",),
    "data recipes": ("test_data_recipes",),
    "short run": ("test_harness", "test_merge", "test_report", "test_run"),
    "serve pages": tuple(f"serve/pages/test_{name}" for name in ("browser", "forms", "live", "pages", "signing_in")),
    "explain": ("test_attribution", "test_explain", "test_influence"),
    **{
        name: (f"test_{name}",)
        for name in ("merging", "mix", "parity", "pipeline", "safety", "stories", "engine", "validation", "study")
    },
    "memory": ("model/test_memory",),
    "methods": ("e2e/test_methods",),
    "faults of a service": ("faults/test_service",),
    "kills": tuple(
        f"faults/test_{name}"
        for name in ("artefacts", "checkpoints", "endings", "forks", "inputs", "kills", "memory", "runs")
    ),
    "out of memory": ("train/test_out_of_memory",),
}
OFFLINE = ROOT / "tests" / "offline"  # holds a sitecustomize that refuses sockets


@pytest.fixture(autouse=True)
def _no_network(socket_disabled: None) -> None:
    return


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption(
        "--fault-table", metavar="PAGE", help="print the table of faults, and write it there if all is well"
    )
    group.addoption("--all-faults", action="store_true", help="every write of a save and 200 random kills, not a few")


def pytest_configure(config: pytest.Config) -> None:
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    ):  # as of what a shell runs in the background: all would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["COLUMNS"] = "120"
    cache = tempfile.mkdtemp(prefix="ift_peft-tests-")
    os.environ["IFT_PEFT_CACHE"] = cache
    atexit.register(shutil.rmtree, cache, ignore_errors=True)


class _BySharedRuns(LoadScopeScheduling):
    """Tests of a group one after another on one worker, all others as workers are free."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0].removesuffix(".py")
        if "faults/" in file and self.config.getoption("--all-faults"):  # minutes: all workers are for them
            return nodeid
        alone = file if "serve/" in file else nodeid  # the tests of a file there share a server
        return next((group for group, files in SHARING.items() if file.endswith(files)), alone)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _BySharedRuns:
    return _BySharedRuns(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" in item.nodeid:
            item.add_marker("gpu")
        if "tests/faults/" in item.nodeid:  # processes are forked and killed there
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """What was imported stays: accelerate collects garbage before each training, and would look through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data sets, tokenizers and a small pretrained Llama, where they lie beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder of real data beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> str:
    """A real pretrained Llama of 260,032 parameters: no chat template, no pad token, 512 positions."""
    return str(shared / "models" / "tinystories-260k" / "hf")


Ift = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def ift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ift:
    """Run the command line in this process, in a folder of its own: a process of its own takes seconds to import."""
    from ift_peft.cli import app

    def run(*arguments: str, stdin: str = "", cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patched:
            patched.chdir(cwd)
            done = CliRunner().invoke(app, list(arguments), input=stdin)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def fresh_ift(tmp_path: Path) -> Ift:
    """Run the command line in a fresh process without network, in a folder of its own."""

    def run(*arguments: str, stdin: str = "", cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-m", "ift_peft", *arguments],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": f"{OFFLINE}{os.pathsep}{ROOT}", "COLUMNS": "120"},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run
