"""Checkpoints that verify or do not exist, and which of them a run can go on from. Imports no torch.

A checkpoint is written to a folder of its own, every file is forced to the disk, then the hashes of all are, and only
then does one rename give it its name. Those that have to go are renamed away before they are deleted. So whatever a
kill or a power cut leaves under a checkpoint's name is whole, and what has been changed since can be told.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ift_peft.durable import disk_full, point, sync_file, sync_folder, write_atomically
from ift_peft.environment import versions
from ift_peft.errors import IftPeftError, RunError, first_line, is_out_of_memory

MANIFEST = "checkpoint.json"
PROGRESS = "progress.json"
# Without any one of these transformers resumes silently to different weights.
REQUIRED = (
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    PROGRESS,
)
ALLOCATION = "rank_allocation.safetensors"  # of AdaLoRA: the importances by which ranks are taken away
PARTIAL = ".partial"  # a checkpoint that is being written
REMOVED = ".removed"  # those that are being deleted, or replaced
LATEST = "latest"
_PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest first: by their steps, whatever the clock said."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


@contextmanager
def writing(folder: Path, step: int, *, made_on: Mapping[str, Any]) -> Iterator[Path]:
    """A folder for the files of the checkpoint after `step`; where the block ends well, it becomes that checkpoint.

    `made_on` is what, beside versions, decides whether it can be gone on from bit by bit: device and threads. Raises
    `DiskFull` or `RunError` where it cannot be written; no other checkpoint is touched then.
    """
    partial = folder / PARTIAL / f"checkpoint-{step}"
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    try:
        with errors_of_writing(folder):
            partial.mkdir(parents=True)
            yield partial
            _seal(partial, {"step": step, "made_on": dict(made_on), "versions": versions()})
            _put(partial, folder)
    finally:
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)


@contextmanager
def errors_of_writing(folder: Path) -> Iterator[None]:
    """Raises `DiskFull` or `RunError` for what torch, safetensors and the system say when they cannot write a file.

    tokenizers has no error of its own: it raises `Exception` itself. That there is no memory is told by who knows what
    it was for.
    """
    try:
        yield
    except IftPeftError:
        raise
    except Exception as error:
        ours = isinstance(error, (OSError, RuntimeError, SafetensorError)) or type(error) is Exception
        if not ours or is_out_of_memory(error):
            raise
        raise disk_full(error, folder) or RunError(
            expected=f"files that can be written to {folder}", found=first_line(error), fix="look at disk and rights"
        ) from error


def _seal(partial: Path, facts: dict[str, Any]) -> None:
    """Force every file to the disk, and write their hashes last."""
    files = {}
    for path in sorted(partial.iterdir()):
        path.chmod(0o644)  # safetensors writes 0600
        sync_file(path)
        files[path.name] = _entry(path)
    write_atomically(partial / MANIFEST, json.dumps({**facts, "files": files}, indent=2) + "\n")


def _put(partial: Path, folder: Path) -> None:
    target = folder / partial.name
    for name in (target.name, LATEST):  # a copy that follows links makes a folder of the latter
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            _move_away(folder / name)
    partial.rename(target)
    sync_folder(folder)
    point(folder / LATEST, target.name)
    shutil.rmtree(folder / REMOVED, ignore_errors=True)


def _move_away(checkpoint: Path) -> None:
    removed = checkpoint.parent / REMOVED
    shutil.rmtree(removed / checkpoint.name, ignore_errors=True)
    removed.mkdir(exist_ok=True)
    checkpoint.rename(removed / checkpoint.name)


def rotate(folder: Path, limit: int | None, *, best: int | None) -> None:
    """Delete the oldest checkpoints until `limit` are left; None or 0: keep all. The newest stays, and that of `best`.

    transformers goes by times of change, so that a clock that was set back costs it the newest.
    """
    found = checkpoints_in(folder)
    spared = [path for path in found[1:] if step_of(path) != best]
    for path in spared[::-1][: max(0, len(found) - limit)] if limit else ():
        _move_away(path)
    shutil.rmtree(folder / REMOVED, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Put right what a process that was killed left behind; to be called by who holds the run."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    for link in folder.glob(f".{LATEST}-*"):  # it was about to become `latest`
        link.unlink()
    for path in checkpoints_in(folder / REMOVED):
        if not (folder / path.name).exists() and faults_of(path) is None:  # it was about to be replaced
            path.rename(folder / path.name)
    shutil.rmtree(folder / REMOVED, ignore_errors=True)


def set_aside_after(folder: Path, step: int) -> None:
    """Rename checkpoints after `step`, which do not verify, to `broken-…`."""
    for path in checkpoints_in(folder):
        if step_of(path) > step:
            aside = folder / f"broken-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def newest_verified(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint with the most steps that can be gone on from, and a line for each newer one that cannot, and why.

    With validation, the best checkpoint up to then must verify as well.
    """
    passed_over: list[str] = []
    for path in checkpoints_in(folder):
        fault = faults_of(path) or _fault_of_best(path)
        if fault is None:
            return path, passed_over
        passed_over.append(f"{path.name} is passed over: {fault}")
    return None, passed_over


def faults_of(checkpoint: Path) -> str | None:
    """What of a checkpoint is not as it was written; None where all is. Every file is read, none is interpreted."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text("utf-8"))["files"]
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"its {MANIFEST} cannot be read"
    unlisted = [path.name for path in checkpoint.iterdir() if path.suffix in _PICKLED and path.name not in listed]
    required = (*REQUIRED, ALLOCATION) if _is_adalora(checkpoint) else REQUIRED
    faults = [f"{name} is not one of its files" for name in unlisted]
    faults += [f"{name} was not written" for name in required if name not in listed]
    faults += [fault for name, entry in listed.items() if (fault := _fault_of_file(checkpoint / name, entry))]
    return "; ".join(faults) or None


def _fault_of_file(path: Path, entry: tuple[int, str]) -> str | None:
    try:
        size = path.stat().st_size
        if not path.is_file() or path.is_symlink():
            return f"{path.name} is no file"
        if size != entry[0]:
            return f"{path.name} has {size:,} bytes instead of {entry[0]:,}"
        if _entry(path)["sha256"] != entry[1]:
            return f"{path.name} has another sha256 than when it was written"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None


def _fault_of_best(checkpoint: Path) -> str | None:
    try:
        best = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["best_global_step"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "its trainer_state.json cannot be read"
    if not best or best == step_of(checkpoint):
        return None
    fault = faults_of(checkpoint.parent / f"checkpoint-{best}")
    return f"its best so far, checkpoint-{best}, could not be gone back to: {fault}" if fault else None


def differences(checkpoint: Path, *, made_on: Mapping[str, Any]) -> list[str]:
    """What is no longer as when `checkpoint` was written, so that going on may not be bit by bit the same."""
    written = json.loads((checkpoint / MANIFEST).read_text("utf-8"))
    before, now = {**written["versions"], **written["made_on"]}, {**versions(), **made_on}
    return [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _is_adalora(checkpoint: Path) -> bool:
    try:
        config = json.loads((checkpoint / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False  # its hash will tell
    return isinstance(config, dict) and config.get("peft_type") == "ADALORA"
