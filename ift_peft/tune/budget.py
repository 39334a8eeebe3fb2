"""What a study may spend and has spent, kept on disk so that it adds up over all sessions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Thread

from ift_peft.durable import write_atomically
from ift_peft.errors import RunError

WRITE_EVERY_SECONDS = 1.0


class Budget:
    """Trials, minutes at work and tokens trained on, against their limits.

    Written to `path` once a second while it is `kept`: of a session that is killed no more than that is forgotten.
    `reserve` is the number of seconds that measuring at the end is expected to take.
    """

    def __init__(self, path: Path, limits: dict[str, float], *, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.limits, self.clock = path, limits, clock
        before = _read(path)
        self.reserve = before["reserve"]
        self._seconds, self._tokens = before["seconds"], before["tokens"]
        self._started = clock()
        self._lock = Lock()

    @property
    def seconds(self) -> float:
        return self._seconds + self.clock() - self._started

    @property
    def tokens(self) -> int:
        return int(self._tokens)

    def spend(self, tokens: int) -> None:
        """Count tokens just trained on."""
        self._tokens += tokens

    def write(self) -> None:
        with self._lock:
            content = {"seconds": round(self.seconds, 3), "tokens": self.tokens, "reserve": round(self.reserve, 3)}
            write_atomically(self.path, json.dumps(content) + "\n")

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write it down every second, whatever this process is at, and when that is over."""
        over = Event()

        def keep() -> None:
            while not over.wait(WRITE_EVERY_SECONDS):
                self.write()

        thread = Thread(target=keep, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.write()

    def spent(self, trials: int) -> dict[str, float]:
        """The share of each limit that is used, by name, of 1; `minutes` with the reserve."""
        used = {"trials": trials, "minutes": (self.seconds + self.reserve) / 60, "tokens": self.tokens}
        return {name: used[name] / limit for name, limit in self.limits.items()}

    def exceeded(self, trials: int) -> str | None:
        """The name of a limit that is reached; None while there is something left of all."""
        return next((name for name, share in self.spent(trials).items() if share >= 1), None)

    def half_spent(self, trials: int) -> bool:
        return any(share >= 0.5 for share in self.spent(trials).values())


def _read(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {"seconds": 0.0, "tokens": 0, "reserve": 0.0}
    try:
        found = json.loads(path.read_text("utf-8"))
        return {name: float(found[name]) for name in ("seconds", "tokens", "reserve")}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            expected=f"what the study has spent in {path}", found=str(error), fix="start over: --fresh"
        ) from None
