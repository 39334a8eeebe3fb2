"""What has to be looked after while nobody asks: files and sessions that have expired."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ift_peft.serve.files.records import clean, sweep
from ift_peft.serve.security.keys import remove_ended_sessions
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Store, StoreUnavailable

log = logging.getLogger("ift_peft.serve")


class Housekeeping:
    """A thread that deletes what has expired, at once and every `limits.sweep_seconds`; `forget` is told the files."""

    def __init__(self, settings: Settings, store: Store, *, forget: Callable[[str], None]) -> None:
        self.settings, self.store, self.forget = settings, store, forget
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        """Remove what a crash has left, then begin."""
        clean(self.settings, self.store)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                deleted = sweep(self.settings, self.store, forget=self.forget)
                remove_ended_sessions(self.store)
                if deleted:
                    log.info("deleted files that had expired", extra={"files": deleted})
            except StoreUnavailable as error:
                log.warning("could not delete what has expired", extra={"code": error.code})
            except Exception as error:  # tried again at the next look; a disk or database that fails is told each time
                log.error("could not delete what has expired", exc_info=error)
            if self._stop.wait(self.settings.limits.sweep_seconds):
                return
