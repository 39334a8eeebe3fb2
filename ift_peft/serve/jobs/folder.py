"""What is handed to the trainer of a job, and what it hands back: files of one folder. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ift_peft.durable import write_atomically
from ift_peft.run_dir import RunDir, json_lines, runs_called

TRAINING_FILE, VALIDATION_FILE = "training_file.jsonl", "validation_file.jsonl"


@dataclass(frozen=True)
class JobFolder:
    """`path` is named by the job's id; below it nothing is kept once the job has ended."""

    path: Path
    token: str = ""
    """Of one trainer: one that lost its service, and is writing its checkpoint, tells nothing to the next service."""

    @property
    def training(self) -> Path:
        return self.path / TRAINING_FILE

    @property
    def validation(self) -> Path:
        return self.path / VALIDATION_FILE

    @property
    def progress(self) -> Path:
        return self.path / f"progress-{self.token}.jsonl"

    @property
    def log(self) -> Path:
        """What the trainer's libraries print, for those who run the service."""
        return self.path / "trainer.log"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def _error(self) -> Path:
        return self.path / f"error-{self.token}.json"

    def take(self, source: Path, target: Path) -> None:
        """Keep the content of an uploaded file for the job, also when that is deleted while the job needs it."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    def handed(self, task: dict[str, Any]) -> JobFolder:
        """Write the task of the next trainer; the folder as that one uses it."""
        token = secrets.token_hex(4)
        for path in self.path.glob("progress-*.jsonl"):
            path.unlink()
        write_atomically(self.path / "task.json", json.dumps({**task, "token": token}, ensure_ascii=False))
        return replace(self, token=token)

    def taken(self) -> tuple[JobFolder, dict[str, Any]]:
        """The folder as its trainer uses it, and the task."""
        task = json.loads((self.path / "task.json").read_text("utf-8"))
        return replace(self, token=task["token"]), task

    def report(self, kind: str, **entries: Any) -> None:
        """One line of progress, in the trainer."""
        with self.progress.open("a", encoding="utf-8") as file:
            file.write(json_lines([{"kind": kind, "at": round(time.time(), 2), **entries}]))

    def reported(self, since: int) -> tuple[list[dict[str, Any]], int]:
        """The whole lines of progress from the byte `since` on, and where the next one begins."""
        if not self.progress.is_file():
            return [], since
        with self.progress.open("rb") as file:
            file.seek(since)
            whole = file.read().rpartition(b"\n")[0]
        if not whole:
            return [], since
        return [json.loads(line) for line in whole.split(b"\n")], since + len(whole) + 1

    def write_error(self, error: dict[str, Any]) -> None:
        write_atomically(self._error, json.dumps(error, ensure_ascii=False))

    def error(self) -> dict[str, Any] | None:
        return dict(json.loads(self._error.read_text("utf-8"))) if self._error.is_file() else None

    def clear(self, *, keep_log: bool = False) -> None:
        """Remove the rows, what was made of them, and the rest; the log stays where it may say what went wrong."""
        if not keep_log:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path != self.log:
                path.unlink(missing_ok=True)


def newest_run(runs: Path, job: str) -> RunDir | None:
    """The run of `job` below the folder `runs`, where it has got as far as having one."""
    found = runs_called(runs, job)
    return found[0] if found else None
