"""What a study may spend and has spent, kept on disk so that it adds up over all sessions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from ift_peft.errors import RunError
from ift_peft.run_dir import write_atomically

WRITE_EVERY_SECONDS = 1.0


class Budget:
    """Trials, minutes at work and tokens trained on, against their limits.

    Written to `path` at most once a second: a session that is killed is forgotten by no more than that. `reserve` is
    the number of seconds that measuring at the end is expected to take.
    """

    def __init__(self, path: Path, limits: dict[str, float], *, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.limits, self.clock = path, limits, clock
        before = _read(path)
        self.reserve = before["reserve"]
        self._seconds, self._tokens = before["seconds"], before["tokens"]
        self._started = self._written = clock()

    @property
    def seconds(self) -> float:
        return self._seconds + self.clock() - self._started

    @property
    def tokens(self) -> int:
        return int(self._tokens)

    def spend(self, tokens: int) -> None:
        """Count tokens just trained on, and write it down if that was not done in the last second."""
        self._tokens += tokens
        if self.clock() - self._written >= WRITE_EVERY_SECONDS:
            self.write()

    def write(self) -> None:
        self._written = self.clock()
        content = {"seconds": round(self.seconds, 3), "tokens": self.tokens, "reserve": round(self.reserve, 3)}
        write_atomically(self.path, json.dumps(content) + "\n")

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
