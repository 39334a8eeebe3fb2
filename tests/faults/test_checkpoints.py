"""Checkpoints that were damaged, forged, left over or dated wrongly, and a disk that is full in truth."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Observed
from tests.faults.forks import Arm
from tests.faults.trained import STEPS, Lab, fill, found, in_its_save, mounted, refused, said, succeeded

pytestmark = pytest.mark.slow
MANIFEST = "checkpoint.json"


def flip(path: Path) -> None:
    """In the second half: there a checkpoint's manifest has the hashes, and nothing that may differ."""
    content = bytearray(path.read_bytes())
    at = random.Random(path.name).randrange(len(content) // 2, len(content))
    content[at] ^= 1 << at % 8
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


HARMS: dict[str, Callable[[Path], None]] = {"a bit flipped": flip, "cut in half": truncate, "deleted": Path.unlink}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "harm" in metafunc.fixturenames:
        metafunc.parametrize("harm", list(HARMS) if metafunc.config.getoption("--all-faults") else ["a bit flipped"])


@pytest.mark.fault(
    "checkpoints",
    "a file of the newest checkpoint {harm}, each in turn",
    expected="checkpoint and file are named, the checkpoint before is taken, and the end is that of an undisturbed run",
)
def test_a_file_of_the_newest(lab: Lab, tmp_path: Path, every: bool, observed: Observed, harm: str) -> None:
    newest = lab.half / "checkpoints" / "checkpoint-4"
    names = sorted(path.name for path in newest.iterdir()) if every else ["scheduler.pt"]
    assert not every or {MANIFEST, "optimizer.pt", "rng_state.pth"} < set(names)
    for name in names:
        run = lab.half_done(tmp_path / name)
        HARMS[harm](run / "checkpoints" / "checkpoint-4" / name)
        resumed = lab.resume(run)
        succeeded(resumed)
        told = said(resumed, "checkpoint-4", "" if name == MANIFEST else name)  # it may be another file that it harms
        said(resumed, "resuming from checkpoint-2")
        assert (run / "checkpoints" / "broken-checkpoint-4").is_dir()
        lab.check_same(run)
        shutil.rmtree(tmp_path / name)
    told = told.removeprefix("warning: ")
    observed(f"{', '.join(names)}: each named, as “{told}”; resumed from checkpoint-2 to the same end")


@pytest.mark.fault(
    "checkpoints",
    "every checkpoint of a run broken",
    expected="each is named; training starts from the first step, says so, and comes to the same end",
    rare=True,
)
def test_all_broken(lab: Lab, tmp_path: Path, observed: Observed) -> None:
    run = lab.half_done(tmp_path)
    truncate(run / "checkpoints" / "checkpoint-2" / "optimizer.pt")
    (run / "checkpoints" / "checkpoint-4" / "rng_state.pth").unlink()
    resumed = lab.resume(run)
    succeeded(resumed)
    for number in (2, 4):
        said(resumed, f"checkpoint-{number}")
    told = said(resumed, "first step")
    lab.check_same(run)
    observed(f"“{told}”; the same end")


@pytest.mark.fault(
    "checkpoints",
    "the clock jumped: the newest checkpoint is dated ten years back, the one before ten years ahead",
    expected="resuming and deleting go by steps: the newest is taken, the oldest deleted",
    rare=True,
)
def test_clock_jumps(lab: Lab, tmp_path: Path, observed: Observed) -> None:
    run = lab.half_done(tmp_path)
    years = 10 * 365 * 86400
    for name, shift in (("checkpoint-2", years), ("checkpoint-4", -years)):
        for path in (*(run / "checkpoints" / name).iterdir(), run / "checkpoints" / name):
            os.utime(path, (time.time() + shift,) * 2)
    told = said(lab.go_on(run), "resuming from checkpoint-4")
    left = sorted(path.name for path in (run / "checkpoints").glob("checkpoint-*"))
    assert left == ["checkpoint-6", f"checkpoint-{STEPS}"]
    observed(f"{told}; {' and '.join(left)} are left in the end")


@pytest.mark.fault(
    "checkpoints",
    "a half-written `.partial` of an earlier save lies beside the checkpoints",
    expected="it is never taken for a checkpoint, and gone in the end",
    rare=True,
)
def test_stale_partial(lab: Lab, tmp_path: Path, observed: Observed) -> None:
    run = lab.half_done(tmp_path)
    stale = run / "checkpoints" / ".partial"
    shutil.copytree(run / "checkpoints" / "checkpoint-4", stale)
    (stale / "left-over").write_text("of a save that was killed", "utf-8")
    truncate(stale / "optimizer.pt")
    told = said(lab.go_on(run), "resuming from checkpoint-4")
    assert not list(run.rglob("left-over")) and not stale.exists()
    observed(f"{told}; the same end; .partial is gone")


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def forge(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file, and its hash where the checkpoint's manifest has it."""
    then = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    (checkpoint / name).write_bytes(content)
    manifest = checkpoint / MANIFEST
    if manifest.exists():
        assert then in manifest.read_text("utf-8")
        entries = json.loads(manifest.read_text("utf-8").replace(then, hashlib.sha256(content).hexdigest()))
        manifest.write_text(json.dumps(sized(entries, name, len(content))), "utf-8")


def sized(entries: Any, name: str, size: int) -> Any:
    """A manifest in which the file's size, where it is noted, is `size`."""
    if not isinstance(entries, dict):
        return entries
    changed = {key: sized(value, name, size) for key, value in entries.items()}
    for key in ("bytes", "size"):
        if isinstance(changed.get(name), dict) and key in changed[name]:
            changed[name][key] = size
    return changed


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.fault(
    "checkpoints",
    "{name} of the newest checkpoint is a pickle that runs code, under a forged manifest",
    expected="the code does not run; an error that names it, no traceback",
    rare=True,
)
def test_pickle_bomb(lab: Lab, tmp_path: Path, observed: Observed, name: str) -> None:
    run, mark = lab.half_done(tmp_path / "runs"), tmp_path / "ran"
    forge(run / "checkpoints" / "checkpoint-4", name, pickle.dumps(Bomb(mark), protocol=2))
    resumed = lab.resume(run)
    assert not mark.exists()
    refused(resumed, 5)
    said(resumed, "pickled files of", "checkpoint-4")
    observed(f"{found(resumed)}; nothing ran")


@pytest.mark.parametrize("content", ["nothing", "text"])
@pytest.mark.fault(
    "checkpoints",
    "optimizer.pt of the newest checkpoint holds {content}, under a forged manifest",
    expected="an error of the checkpoint, no traceback",
    rare=True,
)
def test_forged_garbage(lab: Lab, tmp_path: Path, observed: Observed, content: str) -> None:
    run = lab.half_done(tmp_path)
    forge(run / "checkpoints" / "checkpoint-4", "optimizer.pt", b"" if content == "nothing" else b"not a tensor\n")
    resumed = lab.resume(run)
    refused(resumed, 5)
    said(resumed, "pickled files of", "checkpoint-4")
    observed(found(resumed))


@pytest.mark.fault(
    "checkpoints",
    "a run goes on with other versions than its checkpoint was made with",
    expected="it goes on, and says which differ",
    rare=True,
)
def test_other_versions(lab: Lab, tmp_path: Path, observed: Observed) -> None:
    import torch

    run = lab.half_done(tmp_path)
    for path in (run / "manifest.json", run / "checkpoints" / "checkpoint-4" / MANIFEST):
        text = path.read_text("utf-8")
        assert f'"{torch.__version__}"' in text
        path.write_text(text.replace(f'"{torch.__version__}"', '"2.0.0"'), "utf-8")
    told = said(lab.go_on(run), "torch", "2.0.0", torch.__version__)
    observed(f"“{told}”")


@pytest.mark.fault(
    "checkpoints",
    "a disk that is full when a checkpoint is to be saved (a small tmpfs)",
    expected="disk_full, exit code 12, the checkpoint before is whole; with room again it resumes to the same end",
    rare=True,
)
def test_full_disk(lab: Lab, tmp_path: Path, observed: Observed) -> None:
    with mounted(tmp_path / "disk", mebibytes=48) as small_disk:
        run = lab.half_done(small_disk)
        process = lab.start_resuming(run, arm=Arm(save=1, signal=signal.SIGSTOP))
        in_its_save(process)
        ballast = fill(small_disk)
        process.send_signal(signal.SIGCONT)
        process.wait()
        refused(process, 12)
        manifest = json.loads((run / "manifest.json").read_text("utf-8"))
        assert manifest["status"] == "disk_full"
        ballast.unlink()
        said(lab.go_on(run), "resuming from checkpoint-4")
    observed(
        f"exit code {process.returncode}, {manifest['status']}; "
        "with the room given back resumed from checkpoint-4 to the same end"
    )
