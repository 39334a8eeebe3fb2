"""What the routes share: settings, store, jobs and models, started and stopped together."""

from __future__ import annotations

import fcntl
import logging
import os
from typing import IO, Annotated, cast

from fastapi import Depends, Request

from ift_peft.errors import RunError
from ift_peft.serve.files.identity import check_databases, check_place, tie
from ift_peft.serve.inference.loaded import LoadedModels
from ift_peft.serve.inference.models import finish_removals
from ift_peft.serve.jobs.jobs import Jobs
from ift_peft.serve.operations.housekeeping import Housekeeping
from ift_peft.serve.operations.metrics import Metrics
from ift_peft.serve.pages.look import Looks
from ift_peft.serve.pages.streams import Streams
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Store

log = logging.getLogger("ift_peft.serve")


class Service:
    """One service over one data folder, which no other process may serve."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        check_place(settings)
        for folder in (settings.data_dir, settings.files, settings.runs, settings.jobs):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # one that is there stays as it is
        self._lock = _lock(settings)
        try:
            check_databases(settings)
            self.store = Store(settings.database_url)
            tie(settings, self.store)
        except BaseException:
            self._lock.close()
            raise
        self.streams, self.looks = Streams(settings.limits.streams), Looks()
        self.metrics = Metrics(self)
        self.housekeeping = Housekeeping(settings, self.store, forget=self.looks.forget)
        self.jobs = Jobs(settings, self.store)
        self.models = LoadedModels(settings, self.store)

    def start(self) -> None:
        """Begin with what is to be done; after this, requests are answered. Raises what keeps it from that."""
        mode = self.settings.data_dir.stat().st_mode & 0o777
        if mode & 0o077:
            log.warning("others on this machine can open the data folder; chmod 700 it", extra={"mode": f"{mode:04o}"})
        finish_removals(self.settings, self.store)
        self.housekeeping.start()
        self.jobs.start()

    def stop(self) -> None:
        """Let jobs write their checkpoints, answer what is being answered, and end. What is left goes on at a start."""
        self.jobs.stop()
        self.housekeeping.stop()
        self.models.stop()
        self.release()

    def release(self) -> None:
        """Let go of the folder, also where nothing was started."""
        self.store.close()
        self._lock.close()


def _lock(settings: Settings) -> IO[str]:
    lock = (settings.data_dir / ".lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise RunError(
            expected=f"{settings.data_dir} to itself",
            found="another service over it",
            fix="stop that one, or give another --data-dir",
        ) from None
    os.set_inheritable(lock.fileno(), False)
    return lock


def _of(request: Request) -> Service:
    return cast(Service, request.app.state.service)


Serving = Annotated[Service, Depends(_of)]
"""The parameter of a route that gives it the service."""
