"""A thread that ends the process where a step of training does not end."""

from __future__ import annotations

import faulthandler
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ift_peft.errors import Hung
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir

STACKS = "hung.txt"
_SHORTEST = 600.0  # seconds
_TIMES = 20  # the longest step so far
_LAST_WORDS = 30.0  # seconds for what is written and told: disk or terminal may be what hangs


class Watchdog(TrainerCallback):
    """Ends the process with the exit code of `Hung` when nothing has been heard of training for too long.

    `limit` is in seconds, 0 for none; None: 600, or 20 times the longest step so far where that is more. Time is
    counted in ticks of its own, so that a process that was stopped, or a computer that slept, is not taken for one
    that hangs. A step that holds Python's lock stops this thread too.
    """

    def __init__(self, run: RunDir, reporter: Reporter, *, limit: float | None = None, go_on: str) -> None:
        self.run, self.reporter, self.limit, self.go_on = run, reporter, limit, go_on
        self.tick = 1.0 if not limit else min(1.0, limit / 10)
        self.silent = self.longest = 0.0
        self.since_step = 0.0
        self.step = 0
        self._asleep = True
        self._stop = threading.Event()

    @property
    def allowed(self) -> float:
        """Seconds of silence."""
        return max(_SHORTEST, _TIMES * self.longest) if self.limit is None else self.limit

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is done inside, from when training begins."""
        if self.limit == 0:
            yield
            return
        self._stop.clear()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._asleep = True
            self._stop.set()
            thread.join()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Watch not what is done inside, which may take as long as it takes."""
        asleep, self._asleep = self._asleep, True
        try:
            yield
        finally:
            self.silent, self._asleep = 0.0, asleep

    def _watch(self) -> None:
        while not self._stop.wait(self.tick):
            if self._asleep:
                continue
            self.silent += self.tick
            self.since_step += self.tick
            if self.silent > self.allowed:
                self._end()

    def _end(self) -> None:
        """Write down where every thread stands, and end: a thread that hangs cannot be made to raise anything."""
        telling = threading.Thread(target=self._tell, daemon=True)
        telling.start()
        telling.join(_LAST_WORDS)
        os._exit(Hung.exit_code)

    def _tell(self) -> None:
        error = Hung(
            expected=f"a step within {self.allowed:.0f} s",
            found=f"none after {self.silent:.0f} s, in step {self.step + 1}; where it stands: {self.run.path / STACKS}",
            fix=f"go on with: {self.go_on}, with --step-timeout 0 or more seconds if steps take so long",
        )
        with (self.run.path / STACKS).open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        if (self.run.path / "manifest.json").is_file():  # a trial of a search has none
            self.run.update_manifest(status=error.status, error=f"{type(error).__name__}: {error}"[:2000])
        self.reporter.note(f"error: {error}")

    def _heard(self, state: TrainerState) -> None:
        self.silent, self.step = 0.0, state.global_step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._heard(state)
        self.since_step, self._asleep = 0.0, False

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._heard(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._heard(state)
        self.since_step = 0.0

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._heard(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._heard(state)
        self.longest = max(self.longest, self.since_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._heard(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._heard(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._heard(state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._heard(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._heard(state)
        self._asleep = True
