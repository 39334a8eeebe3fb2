"""How what is done to a run ends, and what its manifest says of that, also when the disk is full."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

from ift_peft.durable import disk_full
from ift_peft.errors import IftPeftError, RunError
from ift_peft.run_dir import RunDir

RESERVE = ".reserve"
RESERVED_BYTES = 64 * 1024


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
