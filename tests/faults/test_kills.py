"""kill -9, and calls that fail, at each write of a save; kill -9 at random moments of a training."""

from __future__ import annotations

import errno
import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.conftest import Observed
from tests.faults.forks import Arm, Forked
from tests.faults.trained import Lab, newest_named, refused, said, succeeded

pytestmark = pytest.mark.slow
BEFORE = "preparing"  # the phase of a process that has not begun, or gone on, to train
OF_TORCH = ("PytorchStreamWriter", "inline_container", "iostream error")  # what it says where it cannot write
FEW = (24,)  # of the calls in a save, without --all-faults


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("--all-faults")
    if "kills" in metafunc.fixturenames:  # in parts, so that workers share them
        metafunc.parametrize(("seed", "kills"), [(seed, 20) for seed in range(10)] if every else [(0, 1)])


def strike(
    lab: Lab, folder: Path, arm: Callable[[Path, int], Arm], came: Callable[[Forked, Path, str], str], *, every: int
) -> tuple[int, Counter[str]]:
    """Strike at a call of the save of step 6, at `every` one or second, … until it runs clean; with 0 at few of them.

    After each, the run is resumed from the newest checkpoint that has its name, and compared with the undisturbed one.
    Returns how often it was struck, and what came of it, as `came` says, which is told the call as well.
    """
    seen: Counter[str] = Counter()
    n = 0
    while every or n < len(FEW):
        n += 1
        at = 1 + (n - 1) * every if every else FEW[n - 1]
        run = lab.half_done(folder / str(n))
        struck = lab.resume(run, arm=arm(run, at))
        if len(struck.calls) < at:
            assert struck.returncode == 0, struck.stderr
            break
        assert "Traceback" not in struck.stderr, (struck.calls[at - 1], struck.stderr)
        seen[came(struck, run, struck.calls[at - 1])] += 1
        if struck.returncode:
            lab.go_on(run)
        else:
            lab.check_same(run)
        shutil.rmtree(folder / str(n))
    assert seen.total() >= len(FEW)
    return seen.total(), seen


def status(run: Path) -> str:
    return str(json.loads((run / "manifest.json").read_text("utf-8"))["status"])


@pytest.mark.fault(
    "checkpoints",
    "kill -9 at each call that changes a file while a checkpoint is saved and an older one is deleted",
    expected="the run resumes to the losses and the adapter of an undisturbed one, byte for byte",
)
def test_killed_at_each_write_of_a_save(shimmed: Lab, tmp_path: Path, every: bool, observed: Observed) -> None:
    def came(struck: Forked, run: Path, call: str) -> str:
        assert struck.returncode == -signal.SIGKILL, struck.stderr
        return "killed"

    times, _ = strike(shimmed, tmp_path, lambda run, n: Arm(f"{run}/*", n=n, save=1), came, every=every)
    observed(f"killed at {times} calls{', until a save ran clean' if every else ''}; resumed to the same each time")


def full(run: Path, n: int, *, from_then_on: bool) -> Arm:
    return Arm(f"{run}/checkpoints*", n=n, error=errno.ENOSPC, from_then_on=from_then_on, save=1)


@pytest.mark.fault(
    "checkpoints",
    "no space left (ENOSPC) from each call on that changes a file while a checkpoint is saved",
    expected="disk_full, exit code 12; then the run resumes to the losses and the adapter of an undisturbed one",
)
def test_disk_full_from_each_write_of_a_save_on(shimmed: Lab, tmp_path: Path, every: bool, observed: Observed) -> None:
    def came(struck: Forked, run: Path, call: str) -> str:
        refused(struck, 12)
        return status(run)

    times, seen = strike(shimmed, tmp_path, partial(full, from_then_on=True), came, every=every)
    assert dict(seen) == {"disk_full": times}
    until = ", until a save ran clean" if every else ""
    observed(f"failed from {times} calls on{until}: exit code 12, disk_full; resumed to the same each time")


@pytest.mark.fault(
    "checkpoints",
    "no space left (ENOSPC) at each third call that changes a file while a checkpoint is saved, and room again at once",
    expected="disk_full or, where torch does not say why it failed, an error of writing; then it resumes as above",
    rare=True,
)
def test_disk_full_once_at_each_write_of_a_save(shimmed: Lab, tmp_path: Path, observed: Observed) -> None:
    def came(struck: Forked, run: Path, call: str) -> str:
        found = status(run)
        refused(struck, {"disk_full": 12, "failed": 5}[found])
        if found == "failed":
            assert any(words in struck.stderr for words in OF_TORCH), (call, struck.stderr)
        return found

    times, seen = strike(shimmed, tmp_path, partial(full, from_then_on=False), came, every=3)
    assert set(seen) == {"disk_full", "failed"}
    observed(f"failed at {times} calls, until a save ran clean: {dict(seen)}; resumed to the same each time")


@pytest.mark.fault(
    "checkpoints",
    "an error of the device (EIO) at each call that changes a file while a checkpoint is saved",
    expected="an error that names it, failed; then the run resumes to the losses and the adapter of an undisturbed one",
    rare=True,
)
def test_device_error_at_each_write_of_a_save(shimmed: Lab, tmp_path: Path, observed: Observed) -> None:
    def came(struck: Forked, run: Path, call: str) -> str:
        if struck.returncode == 0:  # the checkpoint is whole, and what is in the way of its name is gone
            assert call.startswith(("unlink", "rmdir")), call
            return "went on"
        refused(struck, 5)
        said(struck, "expected files that can be")
        return status(run)

    times, seen = strike(
        shimmed, tmp_path, lambda run, n: Arm(f"{run}/checkpoints*", n=n, error=errno.EIO, save=1), came, every=1
    )
    assert set(seen) == {"failed", "went on"}
    observed(f"failed at {times} calls, until a save ran clean: {dict(seen)}; resumed to the same each time")


def resumptions(run: Path) -> list[str | None]:
    """The checkpoint that a run went on from, for each time that it was resumed; None is the first step."""
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    return [one["from"] for one in manifest.get("resumed", [])]


def begun_or_ended(process: Forked) -> None:
    """Wait until a process trains."""
    while process.phase == BEFORE and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.fault(
    "checkpoints",
    "{kills} kill -9s at random moments from the first step to the end, and more before it (seed {seed})",
    expected="the run resumes each time, to the losses and the adapter of an undisturbed one, byte for byte",
)
def test_killed_at_random(lab: Lab, tmp_path: Path, observed: Observed, seed: int, kills: int) -> None:
    rng, phases, whole = random.Random(seed), Counter[str](), 0
    runs = tmp_path / "runs"

    def killed() -> int:
        return phases.total() - phases[BEFORE]

    while killed() < kills or runs.exists():
        begun = [path.parent for path in runs.glob("*/2*/manifest.json")]
        if begun and status(begun[0]) == "succeeded" and (begun[0] / "report.html").is_file():
            lab.check_same(begun[0])
            whole += 1
            shutil.rmtree(runs)
            continue
        newest, before = (newest_named(begun[0]), resumptions(begun[0])) if begun else (None, [])
        process = lab.start_resuming(begun[0]) if begun else lab.start_training(runs)
        if killed() < kills:
            if rng.random() < 0.9:  # the rest is killed while it prepares
                begun_or_ended(process)
            time.sleep(rng.uniform(0, 0.5) * lab.seconds)
            process.kill()
        if process.wait() == -signal.SIGKILL:
            phases[process.phase] += 1
        elif process.returncode == 5 and "run that got as far as its rows" in process.stderr:
            assert newest is None
            shutil.rmtree(runs)  # it said that nothing had begun
        else:
            succeeded(process)
        if begun and begun[0].exists():
            assert resumptions(begun[0])[len(before) :] in ([], [newest]), process.stderr
    told = ", ".join(f"{phases[phase]} in {phase}" for phase in ("saving", "training", "measuring"))
    observed(f"killed {killed()} times ({told}), and {phases[BEFORE]} before; {whole} runs came to the same end")
