"""The run folder: the only output of training and the only input of everything after it. Imports no torch."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ift_peft.durable import disk_full, point, write_atomically
from ift_peft.errors import IftPeftError, RunError
from ift_peft.plain_files import MiB, read_text
from ift_peft.recipe import Recipe, dump_recipe, validate
from ift_peft.yaml_source import read_yaml

PACKAGES = ("ift_peft", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "tokenizers")
LARGEST_RECORD = 1024 * MiB
TIMES = 32  # the length of a recipe that a run may hold: the phrasings of its files are in it, each an entry
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
GOES_ON = ("running", "interrupted", "disk_full", "hung")  # statuses of runs that lack nothing but to be gone on with
UNFINISHED = (*GOES_ON, "out_of_memory", "failed")
METRICS = "metrics.jsonl"
RESERVE = ".reserve"
RESERVED_BYTES = 64 * 1024
_TEMPORARY = re.compile(r"\.[\w-]+\.(json|jsonl|yaml|html)\.[a-z0-9_]{8}")  # of tempfile.mkstemp
Kind = Literal["adapter", "pipeline", "merging"]
MADE: dict[Kind, str] = {"adapter": "one adapter", "pipeline": "a pipeline", "merging": "several adapters compared"}
ADAPTER: tuple[Kind, ...] = ("adapter",)
PIPELINE: tuple[Kind, ...] = ("pipeline",)
ANY: tuple[Kind, ...] = ("adapter", "pipeline", "merging")


def json_lines(lines: Sequence[dict[str, Any]]) -> str:
    """One JSON object a line, readable characters kept."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


class RunIsBusy(RunError):
    """Another process holds the run."""


@dataclass(frozen=True)
class RunDir:
    """Paths and records of one run."""

    path: Path

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def test_rows(self) -> Path:
        return self.path / "test.jsonl"

    def adapter_hashes(self) -> dict[str, str]:
        """sha256 of the adapter's configuration and weights, by file; of a missing one none."""
        hashes = {}
        for name in ADAPTER_FILES:
            if (self.adapter / name).is_file():
                with (self.adapter / name).open("rb") as file:
                    hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return hashes

    def recipe(self) -> Recipe:
        return validate(read_yaml(self.path / "recipe.yaml", times=TIMES))

    def read(self, name: str) -> dict[str, Any]:
        """One of the run's JSON files. Raises `RunError` where it is missing or broken."""
        try:
            content = json.loads(read_text(self.path / name, most=LARGEST_RECORD))
            if not isinstance(content, dict):
                raise ValueError(f"{type(content).__name__}, no object")
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(
                expected=f"{name} in {self.path}",
                found=str(error),
                fix="train again, or give a finished run (ift runs)",
            ) from None
        return content

    def write(self, name: str, content: Any) -> None:
        write_atomically(self.path / name, json.dumps(content, ensure_ascii=False, indent=2) + "\n")

    def write_lines(self, name: str, lines: list[dict[str, Any]]) -> None:
        write_atomically(self.path / name, json_lines(lines))

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """What `write_lines` wrote. Lines end in a line feed and nowhere else: texts hold other separators (U+2028)."""
        number, found = 0, []
        try:
            with (self.path / name).open(encoding="utf-8", newline="\n") as lines:
                for number, line in enumerate(lines, start=1):  # noqa: B007 - told below
                    found.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise RunError(
                expected=f"one JSON object a line in {self.path / name}",
                found=f"{error!s:.200} at line {number + isinstance(error, UnicodeDecodeError)}",
                fix="restore the file, or train again",
            ) from None
        return found

    def read_metrics(self) -> tuple[list[dict[str, Any]], int]:
        """The lines of metrics.jsonl up to the first that is none, and how many whole lines are left out.

        A kill cuts the last line short, which is no line then; after a power cut there may be anything in it.
        """
        path = self.path / METRICS
        whole = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        found: list[dict[str, Any]] = []
        for line in whole:
            try:
                one = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(one, dict) or type(one.get("step")) is not int:
                break
            found.append(one)
        return found, len(whole) - len(found)

    def remove_temporaries(self) -> None:
        """Remove what processes that were killed left of `write_atomically`; for who holds the run."""
        for path in self.path.glob(".*.????????"):
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def append(self, name: str, line: dict[str, Any]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json_lines([line]))

    def update_manifest(self, **entries: Any) -> None:
        self.write("manifest.json", {**self.read("manifest.json"), **entries})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process. Raises `RunIsBusy` where another one trains in it."""
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunIsBusy(
                    expected=f"{self.path} to itself", found="another process training in it", fix="wait for it"
                ) from None
            yield

    @property
    def kind(self) -> Kind:
        """What the run made: an adapter of its own, or of several runs, its `parts`, something more."""
        kind = self.read("manifest.json").get("kind", "adapter")
        if not isinstance(kind, str) or kind not in MADE:
            raise RunError(
                expected=f"a run of the kind {', '.join(MADE)}", found=f"{kind!r:.80} in {self.path}", fix="train again"
            )
        return kind

    @property
    def is_whole(self) -> bool:
        """Whether the run succeeded, and its adapter is as training left it."""
        manifest = self.read("manifest.json")
        return manifest.get("status") == "succeeded" and manifest.get("adapter_sha256") == self.adapter_hashes()

    @property
    def parts(self) -> dict[str, RunDir]:
        """The runs that this one is made of, by name; none where it has an adapter of its own."""
        parts = self.read("manifest.json").get("parts", {})
        if not isinstance(parts, dict) or not all(isinstance(path, str) for path in parts.values()):
            raise RunError(
                expected="parts by name, each a folder", found=f"{parts!r:.80} in {self.path}", fix="train again"
            )
        return {name: RunDir(Path(os.path.normpath(self.path / path))) for name, path in parts.items()}

    @property
    def status(self) -> str:
        return str(self.read("manifest.json").get("status", "unknown"))


def create_run(recipe: Recipe, root: Path) -> RunDir:
    """A new folder `root`/<recipe>/<time-id>, with the resolved recipe and a manifest, and `latest` pointing at it.

    Raises `RunError` where `latest` is not a link: what it is would be lost.
    """
    link = root / recipe.name / "latest"
    if link.exists() and not link.is_symlink():
        raise RunError(
            expected=f"a link in {link}, or nothing",
            found="a folder" if link.is_dir() else "a file",
            fix="rename it: it is made to point at the newest run",
        )
    now = datetime.now().astimezone()
    run = RunDir(root / recipe.name / f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}")
    run.path.mkdir(parents=True)
    write_atomically(run.path / "recipe.yaml", dump_recipe(recipe))
    run.write(
        "manifest.json",
        {
            "recipe": recipe.name,
            "status": "running",
            "started": now.isoformat(timespec="seconds"),
            "versions": versions(),
            "git": git_state(),
            "hardware": hardware(),
            "command": ["ift", *(one.encode("utf-8", "backslashreplace").decode() for one in sys.argv[1:])],
            "settings": settings(recipe),
        },
    )
    point_latest(run)
    return run


def settings(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides training, beside what is told by its content, as rows, base and teacher are."""
    found = recipe.model_dump(mode="json", include={"base", "adapter", "loss", "training", "validation"})
    for section, name in (("base", "model"), ("base", "device"), ("loss", "teacher")):
        found[section].pop(name, None)
    return found


@contextmanager
def ending(run: RunDir, *, since: float | None = None) -> Iterator[None]:
    """Record in the manifest how what is done to `run` ends: as succeeded, or as the error says that ended it.

    Its seconds are counted from `since`, a time of `time.monotonic`, or from now. A full disk, by whichever error it
    shows, is raised as `DiskFull`.
    """
    started = time.monotonic() if since is None else since
    _reserve(run)
    try:
        yield
        finished = datetime.now().astimezone().isoformat(timespec="seconds")
        run.update_manifest(status="succeeded", finished=finished, seconds=round(time.monotonic() - started, 1))
        (run.path / RESERVE).unlink(missing_ok=True)
    except BaseException as error:
        full = None if isinstance(error, IftPeftError) else disk_full(error, run.path)
        _record_end(run, full or error)
        if full is not None:
            raise full from error
        raise


def _record_end(run: RunDir, error: BaseException) -> None:
    interrupted = isinstance(error, KeyboardInterrupt)
    status = "interrupted" if interrupted else getattr(error, "status", "failed")
    told = {} if status == "interrupted" else {"error": f"{type(error).__name__}: {error}"[:2000]}
    try:
        run.update_manifest(status=status, **told)
    except (OSError, RunError, MemoryError):  # of a full disk, or what has ended it
        (run.path / RESERVE).unlink(missing_ok=True)
        with suppress(OSError, RunError, MemoryError):  # it stays `running`, which can be gone on with just as well
            run.update_manifest(status=status, **told)


def _reserve(run: RunDir) -> None:
    """Take up room that the last word about a run can have when the disk is full."""
    (run.path / RESERVE).write_bytes(os.urandom(RESERVED_BYTES))


def point_latest(run: RunDir) -> None:
    """Make the sibling link `latest` point at `run`."""
    point(run.path.parent / "latest", run.path.name)


def open_run(path: str | Path, *, finished: bool = True, kinds: Collection[Kind] = ADAPTER) -> RunDir:
    """The run at `path`: a run folder, its `latest` link, or a recipe's folder of runs.

    Raises `RunError` where there is none; with `finished`, where it did not end as succeeded; and where it is not of
    these `kinds`.
    """
    folder = Path(path)
    if not (folder / "manifest.json").is_file() and (folder / "latest" / "manifest.json").is_file():
        folder = folder / "latest"
    if not (folder / "manifest.json").is_file():
        raise RunError(
            expected="a run folder such as runs/sentiment/latest",
            found=f"no manifest.json in {folder}",
            fix="list the runs with: ift runs",
        )
    run = RunDir(folder.resolve())
    if finished and run.status != "succeeded":
        fix = f"finish it with: ift train --resume {run.path}" if run.status in UNFINISHED else "train again"
        raise RunError(expected="a run that succeeded", found=f"status {run.status!r} in {run.path}", fix=fix)
    if run.kind not in kinds:
        fix = f"name one of its parts: {', '.join(os.path.relpath(part.path) for part in run.parts.values())}"
        raise RunError(
            expected=f"a run of {' or '.join(MADE[kind] for kind in kinds)}",
            found=f"one of {MADE[run.kind]}: {run.path}",
            fix=f"ask it with ift pipeline, or {fix}" if run.kind == "pipeline" else fix,
        )
    return run


def runs_called(root: Path, name: str) -> list[RunDir]:
    """Every run of the recipe `name` below `root`, the newest first."""
    folders = (manifest.parent for manifest in (root / name).glob("*/manifest.json"))
    return [RunDir(folder) for folder in sorted(folders, reverse=True) if not folder.is_symlink()]


def list_runs(root: Path) -> list[RunDir]:
    """Every run below `root`, oldest first."""
    folders = (manifest.parent for manifest in root.glob("*/*/manifest.json") if not manifest.parent.is_symlink())
    return [RunDir(folder) for folder in sorted(folders, key=lambda folder: folder.name)]


def versions() -> dict[str, str]:
    """Python and the packages that decide a run's outcome."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the working directory and whether it has uncommitted changes; None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    return result.stdout.strip()


def hardware() -> dict[str, Any]:
    import psutil

    return {
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }
