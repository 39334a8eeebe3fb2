"""That what is forked is a process like another, and that the shim sees each way in which files are written."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from ift_peft.plain_files import MiB
from tests.faults.forks import Arm
from tests.faults.trained import Lab

pytestmark = pytest.mark.slow
HERE = "tests.faults.test_forks"


def tell(*arguments: str) -> None:
    """In the fork: print what a process has of its own, and end as the first argument says."""
    print(os.getcwd(), os.environ.get("IFT_TEST_ENV"), sys.argv[1:], repr(sys.stdin.read()), flush=True)
    if arguments[0] == "raise":
        raise ValueError("said so")
    if arguments[0] == "sleep":
        time.sleep(600)
    sys.exit(int(arguments[0]))


def take(size: str) -> None:
    """In the fork: take so many bytes."""
    print(len(bytearray(int(size))), flush=True)


def write(folder: str) -> None:
    """In the fork: write a file in each of the ways that a save does, and tell what failed."""
    import torch
    from safetensors.torch import save_file

    from ift_peft.durable import write_atomically

    path = Path(folder)
    ways = {
        "torch": lambda: torch.save({"a": torch.zeros(9999)}, path / "torch.pt"),
        "safetensors": lambda: save_file({"a": torch.zeros(9)}, str(path / "a.safetensors")),
        "python": lambda: write_atomically(path / "python.json", "{}"),
        "unlink": lambda: (path / "there").unlink(),
    }
    for name, way in ways.items():
        try:
            way()
        except Exception as error:
            print(name, type(error).__name__, getattr(error, "errno", None))


def test_a_fork_is_a_process_like_another(lab: Lab, tmp_path: Path) -> None:
    start = lab.forks.start
    told = start("3", "x", cwd=tmp_path, env={"IFT_TEST_ENV": "set"}, target=f"{HERE}:tell")
    assert told.wait() == 3
    assert told.stdout == f"{tmp_path} set ['3', 'x'] ''\n"
    raised = start("raise", cwd=tmp_path, target=f"{HERE}:tell")
    assert raised.wait() == 1
    assert "ValueError: said so" in raised.stderr
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = start("sleep", cwd=tmp_path, target=f"{HERE}:tell")
        while not process.stdout:
            assert process.poll() is None, process.stderr
            time.sleep(0.01)
        assert process.poll() is None
        process.send_signal(number)
        code = process.wait()
        if number == signal.SIGINT:  # python -m ends so
            assert code in (1, -number) and "KeyboardInterrupt" in process.stderr
        else:
            assert code == -number


def test_a_fork_is_bounded_in_time_and_memory(lab: Lab, tmp_path: Path) -> None:
    run = lab.forks.run
    for size, fits in ((8 * MiB, True), (128 * MiB, False)):
        process = run(str(size), cwd=tmp_path, memory=64 * MiB, target=f"{HERE}:take")
        assert (process.returncode == 0, process.stdout) == (fits, f"{size}\n" if fits else "")
        assert fits or "MemoryError" in process.stderr
        assert 100 < process.megabytes < 2500  # of what it was forked from
    with pytest.raises(TimeoutError, match="has not ended after") as caught:
        run("sleep", cwd=tmp_path, timeout=0.3, target=f"{HERE}:tell")
    assert not Path("/proc", str(caught.value).split()[0]).exists()


def test_the_shim_sees_every_way_to_write(shimmed: Lab, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    counted = shimmed.forks.run(str(tmp_path), cwd=tmp_path, arm=Arm(f"{tmp_path}/*"), target=f"{HERE}:write")
    assert counted.returncode == 0
    assert not counted.stdout
    calls = [call.replace(f"{tmp_path}/", "").split(" ", 1) for call in counted.calls]
    for name in ("torch.pt", "python.json", "there"):
        assert any(path.endswith(name) for _, path in calls), calls
    assert {"write", "writev", "fsync", "unlink"} <= {call for call, _ in calls}
    assert any(call == "write" and path.startswith(".tmp") for call, path in calls)  # safetensors' own name for it


def test_the_shim_kills_and_fails(shimmed: Lab, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    for arm, code in ((Arm(f"{tmp_path}/*", n=2), -signal.SIGKILL), (Arm("/elsewhere/*", n=1), 0)):
        assert shimmed.forks.run(str(tmp_path), cwd=tmp_path, arm=arm, target=f"{HERE}:write").returncode == code
    (tmp_path / "there").touch()
    full = Arm(f"{tmp_path}/*", n=1, error=28, from_then_on=True)
    process = shimmed.forks.run(str(tmp_path), cwd=tmp_path, arm=full, target=f"{HERE}:write")
    assert [line.split()[0] for line in process.stdout.splitlines()] == ["torch", "safetensors", "python"]
    assert "python OSError 28" in process.stdout
    assert not (tmp_path / "there").exists()  # a full disk lets files be deleted
