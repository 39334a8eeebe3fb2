"""One attempt at a job: its trainer started, followed and stopped, and what it left made the job's outcome."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from sqlalchemy import select

from ift_peft.serve.files.records import forget_deleted
from ift_peft.serve.jobs.folder import JobFolder
from ift_peft.serve.jobs.progress import Progress
from ift_peft.serve.jobs.queue import Stopping
from ift_peft.serve.jobs.records import ACTIVE, change, fail, tell
from ift_peft.serve.jobs.results import succeed, tidy
from ift_peft.serve.objects import FINAL
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Record, Store
from ift_peft.serve.store.tables import jobs
from ift_peft.yaml_source import laid_over

log = logging.getLogger("ift_peft.serve")
FOLLOW_SECONDS = 0.3
GRACE_SECONDS = 30.0  # from SIGTERM, after which a trainer writes a checkpoint and ends, to SIGKILL
MOST_DEATHS = 3  # of trainers, one after another and without a further step between
STOPPED = (130, -signal.SIGTERM)


class Attempt:
    """The attempt `number` at `job`. It ends where the job ends, is paused, or is queued for another attempt."""

    def __init__(self, settings: Settings, store: Store, stopping: threading.Event, job: str, number: int) -> None:
        self.settings, self.store, self.stopping = settings, store, stopping
        self.job, self.number = job, number
        self.folder = JobFolder(settings.jobs / job)

    def run(self) -> None:
        """Raises `Stopping` where the service stops before the attempt has ended."""
        try:
            self._run()
        except Exception as error:
            if self._record() is None:  # it was withdrawn, and its files are gone
                self._leave()
                return
            log.exception("an attempt at a job broke off", extra={"job": self.job})
            fail(
                self.store,
                self.job,
                self.number,
                code="internal_error",
                message=f"{type(error).__name__} in the service",
            )
            self.folder.clear(keep_log=True)

    def _run(self) -> None:
        deaths, steps = 0, 0
        with self.store.begin() as connection:
            is_new = select(jobs.c.id).where(jobs.c.id == self.job, jobs.c.checked_at.is_(None))
            if connection.execute(is_new).first() is not None:
                change(connection, self.job, to="validating_files", of=("queued",), attempt=self.number)
        while record := self._record():
            folder = self.folder.handed(self._task(record))
            progress = Progress(self.settings, self.store, record, folder)
            code = self._train(progress)
            if code == 0 and self._succeed(progress):
                return
            if self.stopping.is_set():
                raise Stopping
            if self._record() is None:
                break
            error = folder.error()
            if code > 0 and code not in STOPPED:
                self._fail(
                    error or {"code": "internal_error", "message": f"the trainer ended with {code}", "param": None}
                )
                return
            deaths, steps = (1 if progress.steps > steps else deaths + 1), max(steps, progress.steps)
            if deaths >= MOST_DEATHS:
                self._fail({"code": "trainer_died", "message": f"the trainer was killed {deaths} times", "param": None})
                return
            with self.store.begin() as connection:
                tell(connection, self.job, "The trainer was stopped from outside; it is started again", level="warn")
        self._leave()

    def _leave(self) -> None:
        """What is to be removed of a job that was withdrawn can be, now that its trainer writes no more."""
        ended = self.store.one(select(jobs.c.status).where(jobs.c.id == self.job))
        if ended is not None and ended["status"] in FINAL:
            tidy(self.settings, self.job)
        forget_deleted(self.settings, self.store, self.job)

    def _record(self) -> Record | None:
        """The job, as long as this attempt is to go on with it."""
        is_ours = (jobs.c.id == self.job, jobs.c.status.in_(ACTIVE), jobs.c.attempt == self.number)
        return self.store.one(select(jobs).where(*is_ours))

    def _task(self, record: Record) -> dict[str, Any]:
        held = {"train": str(self.folder.training)}
        if record["validation_file"] is not None:
            held["test"] = str(self.folder.validation)
        return {
            "recipe": laid_over(record["recipe"], {"data": held}),
            "base": record["base"],
            "runs": str(self.settings.runs),
            "devices": str(self.settings.data_dir / "devices"),
            "checked": record["checked_at"] is not None,
        }

    def _train(self, progress: Progress) -> int:
        """Start the trainer and follow it to its end; its exit code."""
        command = [sys.executable, "-m", "ift_peft.serve.jobs.trainer", str(self.folder.path), str(os.getpid())]
        with self.folder.log.open("ab") as output:
            trainer = subprocess.Popen(
                command,
                cwd=self.settings.data_dir,
                env={**os.environ, "IFT_PEFT_CACHE": str(self.folder.cache)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            return self._follow(trainer, progress)
        finally:
            if trainer.poll() is None:
                os.killpg(trainer.pid, signal.SIGKILL)
                trainer.wait()

    def _follow(self, trainer: subprocess.Popen[bytes], progress: Progress) -> int:
        killed_at: float | None = None
        while True:
            try:
                code = trainer.wait(FOLLOW_SECONDS)
                progress.update()
                return code
            except subprocess.TimeoutExpired:
                progress.update()
            if killed_at is None and (self.stopping.is_set() or self._record() is None):
                trainer.terminate()
                killed_at = time.monotonic() + GRACE_SECONDS
            elif killed_at is not None and time.monotonic() > killed_at:
                os.killpg(trainer.pid, signal.SIGKILL)

    def _succeed(self, progress: Progress) -> bool:
        succeeded = succeed(self.settings, self.store, progress)
        if succeeded:
            self.folder.clear()
        return succeeded

    def _fail(self, error: dict[str, str | None]) -> None:
        code, message = str(error["code"]), str(error["message"])
        if fail(self.store, self.job, self.number, code=code, message=message, param=error["param"]):
            log.warning("a job failed", extra={"job": self.job, "code": code})
        self.folder.clear(keep_log=code in ("internal_error", "trainer_died"))


def withdraw(store: Store, job: str, *, to_cancelled: bool) -> bool:
    """Cancel or pause `job`; its trainer, if any, sees it and stops. Whether its status was one that this changes."""
    with store.begin() as connection:
        if to_cancelled:
            changed = change(connection, job, to="cancelled", of=(*ACTIVE, "paused"))
        else:
            changed = change(connection, job, to="paused", estimated_finish=None)
        if changed:
            tell(connection, job, "The job was cancelled" if to_cancelled else "The job was paused")
        return changed
