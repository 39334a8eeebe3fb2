"""Models that could not be loaded: who asks for one again soon is told the same, and nothing is tried."""

from __future__ import annotations

import logging
import threading
import time

from ift_peft.errors import BusyError, IftPeftError
from ift_peft.serve.errors import ApiError, as_api_error

log = logging.getLogger("ift_peft.serve")
FAILED_SECONDS = 10.0  # for which a model that could not be loaded is not tried again


class Failures:
    """What models failed with, by name. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[float, ApiError]] = {}

    def check(self, name: str) -> None:
        """Raises the `ApiError` that the model failed with, for FAILED_SECONDS after it did."""
        with self._lock:
            until, error = self._kept.get(name, (0.0, None))
        if error is not None and time.monotonic() < until:
            raise error.with_traceback(None)

    def told(self, name: str, error: Exception) -> ApiError:
        """What is told of a model that could not be loaded: 429 where there was no room, which is not kept, else 503.

        The log says why, without what rows hold.
        """
        if isinstance(error, BusyError):
            return as_api_error(error)
        if isinstance(error, IftPeftError):
            log.error("model not loaded: expected %s; %s", error.expected, error.fix, extra={"model": name})
        else:
            log.error("model not loaded", exc_info=error, extra={"model": name})
        message = f"The model {name!r} cannot be loaded; the server's log says why."
        failed = ApiError(503, message, code="model_unavailable", param="model")
        with self._lock:
            self._kept[name] = (time.monotonic() + FAILED_SECONDS, failed)
        return failed

    def forget(self, name: str) -> None:
        with self._lock:
            self._kept.pop(name, None)
