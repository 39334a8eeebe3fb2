"""Token buckets: so many requests a minute, which may come at once."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

MOST = 10_000  # callers that are remembered


class Rates:
    """One bucket for each caller. Not for several threads."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and when that was

    def wait(self, caller: str) -> float:
        """Take one request from the caller's bucket: 0, or the seconds after which there will be one."""
        now = self._clock()
        left, then = self._buckets.pop(caller, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        wait = 0.0 if left >= 1 else (1 - left) * 60 / self.per_minute
        self._buckets[caller] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > MOST:
            self._buckets.popitem(last=False)
        return wait
