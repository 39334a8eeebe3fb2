"""A short training that was not disturbed, one that was killed half-way, and what a disturbed one has to come to."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forks import Arm, Forked, Forks, forks
from tests.train.small import write_small

STEPS, EVERY = 8, 2
IN_TIME = 60.0  # seconds in which hostile input is taken or refused
SETTINGS = (
    f"training.max_steps={STEPS}",
    "training.save_strategy=steps",
    f"training.save_steps={EVERY}",
    r"adapter.target_modules=.*layers\.3\.self_attn\.q_proj",  # fewer weights are fewer writes to fail at
)
TWO_KEPT = "training.save_total_limit=2"


@dataclass
class Lab:
    """Where trainings are disturbed. `folder` holds the recipe small.yaml and its rows, and one cache for all.

    `losses` are the lines of metrics.jsonl without those of time, `weights` the adapter, of the undisturbed run.
    """

    forks: Forks
    folder: Path
    losses: list[dict[str, Any]] = field(default_factory=list)
    weights: bytes = b""
    seconds: float = 0.0
    half: Path = Path()

    def start(self, *arguments: str, **options: Any) -> Forked:
        env = {"IFT_PEFT_CACHE": str(self.folder / "cache"), **options.pop("env", {})}
        return self.forks.start(*arguments, cwd=self.folder, env=env, **options)

    def start_training(self, runs: Path, *overrides: str, **options: Any) -> Forked:
        return self.start("train", "small.yaml", *SETTINGS, *overrides, "--runs-dir", str(runs), **options)

    def train(self, runs: Path, *overrides: str, **options: Any) -> Forked:
        process = self.start_training(runs, *overrides, **options)
        process.wait()
        return process

    def start_resuming(self, run: Path, **options: Any) -> Forked:
        return self.start("train", "--resume", str(run), **options)

    def resume(self, run: Path, **options: Any) -> Forked:
        process = self.start_resuming(run, **options)
        process.wait()
        return process

    def go_on(self, run: Path, **options: Any) -> Forked:
        """Resume a run, which has to go on from its newest checkpoint, and come to the end of the undisturbed one."""
        newest = newest_named(run)
        assert newest is not None
        resumed = self.resume(run, **options)
        succeeded(resumed)
        said(resumed, f"resuming from {newest}")
        self.check_same(run)
        return resumed

    def half_done(self, runs: Path) -> Path:
        """A copy of the run that was killed when step 6 was to be saved: it has the checkpoints of steps 2 and 4."""
        run = runs / "small" / self.half.name
        shutil.copytree(self.half, run, symlinks=True)
        return run

    def check_same(self, run: Path) -> None:
        """That a run succeeded, with the losses of the undisturbed one, and its adapter byte for byte."""
        manifest = json.loads((run / "manifest.json").read_text("utf-8"))
        assert manifest["status"] == "succeeded"
        assert losses(run) == self.losses
        assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == self.weights
        kept = {path.name for path in (run / "checkpoints").iterdir()} - {"latest"}
        assert f"checkpoint-{STEPS}" in kept and all(
            re.fullmatch(r"(broken-)?checkpoint-\d+", name) for name in kept
        ), kept


def newest_named(run: Path) -> str | None:
    """The last by its steps of what lies in a run under the name of a checkpoint, whatever is in it."""
    names = [path.name for path in (run / "checkpoints").glob("checkpoint-*")]
    return max(names, key=lambda name: int(name.rpartition("-")[2]), default=None)


def losses(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def the_run(runs: Path) -> Path:
    """The only run below `runs`."""
    (run,) = (path.parent for path in runs.glob("*/*/manifest.json") if not path.parent.is_symlink())
    return run


def succeeded(process: Forked) -> None:
    assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr


def refused(process: Forked, *codes: int) -> None:
    """That a process ended with an error that we wrote: with one of these exit codes, and no traceback."""
    assert process.returncode in (codes or range(2, 15)), (process.returncode, process.stderr)
    assert "Traceback" not in process.stderr, process.stderr
    assert "expected" in process.stderr and "fix" in process.stderr, process.stderr


def came_to(process: Forked, code: int, words: Sequence[str] = ()) -> None:
    """That a process ended with this exit code: 0, or that of an error that we wrote, which has all of `words`."""
    if code:
        refused(process, code)
    else:
        succeeded(process)
    line = " ".join(process.stderr.split())
    for one in words:
        assert one in line, line


def told(process: Forked) -> str:
    """The error of a process as one line."""
    return " ".join(process.stderr.partition("error: ")[2].split())[:300]


def said(process: Forked, *words: str) -> str:
    """The first line of stderr that has all of `words`."""
    lines = [line.strip() for line in process.stderr.splitlines()]
    found = next((line for line in lines if all(word in line for word in words)), None)
    assert found is not None, process.stderr
    return found


def found(process: Forked, *words: str) -> str:
    """The line of an error that says what was found, or that has `words`, without what differs from time to time."""
    line = said(process, *(words or ("found",)))
    for pattern, name in (
        (r"/[^\s:']*/(?=[^\s/:']+)", "…/"),  # folders
        (r"\d{8}-\d{6}-[0-9a-f]{4}", "RUN"),
        (r"\.(\S+)\.\w{8}(?=')", r"\1"),  # written under another name first
        (r" \([0-9a-f]{12}\)", ""),
    ):
        line = re.sub(pattern, name, line)
    return f"exit code {process.returncode}: {line.removeprefix('error: ')}"


def in_its_save(process: Forked) -> None:
    """Wait for the save at which a process stops."""
    while process.phase != "saving":
        assert process.poll() is None, process.stderr
        time.sleep(0.02)


@contextmanager
def mounted(folder: Path, *, mebibytes: int) -> Iterator[Path]:
    """A file system of its own, in memory; skips where this process may mount none."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m,mode=0700", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, *, but: int = 0) -> Path:
    """A file that takes all the room there is, but so many bytes."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, max(0, ballast.stat().st_size - but))
    return ballast


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """The server of processes."""
    with forks(tmp_path_factory.mktemp("forks") / "server") as one:
        yield one


@pytest.fixture(scope="session")
def lab(server: Forks, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The server of processes, an undisturbed run and one killed half-way."""
    folder = tmp_path_factory.mktemp("kills")
    write_small(folder)
    one = Lab(server, folder)
    undisturbed = one.train(folder / "undisturbed")
    succeeded(undisturbed)
    run = the_run(folder / "undisturbed")
    one.losses, one.seconds = losses(run), undisturbed.seconds
    one.weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert [line["step"] for line in one.losses] == list(range(1, STEPS + 1))
    killed = one.train(folder / "half", TWO_KEPT, arm=Arm(save=3))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    one.half = the_run(folder / "half")
    return one


@pytest.fixture
def shimmed(lab: Lab) -> Lab:
    """The lab, where calls can be counted."""
    if lab.forks.shim is None:
        told = lab.forks.folder / "cc"
        why = told.read_text("utf-8").strip() if told.exists() else "no C compiler"
        pytest.skip(f"{why}: nothing can be made to fail at the n-th write")
    return lab
