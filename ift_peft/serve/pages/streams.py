"""How many pages may follow a job at once, and how they are told that the service ends."""

from __future__ import annotations

import threading

from ift_peft.serve.errors import ApiError


class Streams:
    """Counts what is open. Of every thread."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.open = 0
        self.closing = threading.Event()
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Take one of the places. Raises `ApiError` (503) where there is none, or the service ends."""
        with self._lock:
            if self.open >= self.most or self.closing.is_set():
                raise ApiError(
                    503,
                    f"{self.open} pages are followed live already, the most that this service allows.",
                    code="too_many_streams",
                    headers={"Retry-After": "10"},
                )
            self.open += 1

    def leave(self) -> None:
        with self._lock:
            self.open -= 1

    def close(self) -> None:
        """End all of them soon, and begin no more."""
        self.closing.set()
