"""What is told and written of a training while it goes on, and how it is asked to stop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ift_peft.durable import sync_file, sync_folder
from ift_peft.reporter import Reporter
from ift_peft.run_dir import METRICS, RunDir
from ift_peft.train.progress import Progress
from ift_peft.train.trainer import SupervisedTrainer


class RunRecorder(TrainerCallback):
    """Writes metrics.jsonl, reports progress, and stops when asked to."""

    def __init__(self, run: RunDir, reporter: Reporter) -> None:
        self.run, self.reporter = run, reporter
        self.trainer: SupervisedTrainer | None = None
        self.stopped_by: str | None = None
        """The signal that asked for an end."""
        self._told_stopping = False
        self.loss: float | None = None
        self.started = time.monotonic()
        self.ended: float | None = None
        self.resumed: Progress | None = None
        self.seen_before = 0
        """Tokens, in the processes before this one."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.trainer is not None
        if self.resumed is not None:
            self.trainer.restore(self.resumed)
            self.seen_before = self.resumed.tokens_seen
            if self.resumed.halvings:
                since = f" at step {self.resumed.halved_at}" if self.resumed.halved_at else ""
                self.reporter.note(f"{_rows(self.trainer.rows_at_once)} at a time: memory ran out{since}")
        self.record_micro_batch()
        self.started = time.monotonic()
        self.reporter.stage("training", state.max_steps)

    @property
    def tokens_per_second(self) -> float:
        assert self.trainer is not None
        seen = self.trainer.progress.tokens_seen - self.seen_before
        return seen / max(1e-9, (self.ended or time.monotonic()) - self.started)

    @property
    def stop_requested(self) -> bool:
        return self.stopped_by is not None

    def _tell_stopping(self) -> None:
        if self.stop_requested and not self._told_stopping:
            self._told_stopping = True
            self.reporter.note(
                f"{self.stopped_by}: stopping after this step with a checkpoint; once more stops at once"
            )

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._tell_stopping()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._tell_stopping()
        loss = "" if self.loss is None else f"loss {self.loss:.4f}  "
        self.reporter.advance(state.global_step, f"{loss}{self.tokens_per_second:,.0f} tokens/s")
        if self.stop_requested:
            # At the end of an epoch that ends in a measurement the checkpoint is written after it.
            control.should_save = not (_ends_epoch(state) and args.eval_strategy == "epoch")
            control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stop_requested and not _ends_epoch(state):  # transformers calls any stop the end of an epoch
            control.should_evaluate = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if any(name.startswith("eval_") for name in logs):
            self.run.append(METRICS, {"step": state.global_step, **logs})
        if "loss" not in logs:
            return
        self.loss = float(logs["loss"])
        self.run.append(
            METRICS,
            {"step": state.global_step, **logs, "tokens_per_second": round(self.tokens_per_second, 1)},
        )

    def keep_lines(self, checkpoint: Path) -> None:
        """Have the lines of the log reach the disk, before the checkpoint does that stands after them."""
        if (self.run.path / METRICS).is_file():
            sync_file(self.run.path / METRICS)
            sync_folder(self.run.path)

    def halved(self, rows: int, now: int, step: int) -> None:
        """Tell that memory ran out with `rows` rows at a time, and that there are `now` from `step` on."""
        assert self.trainer is not None
        drawn = " and ".join(self.trainer.drawn_for_rows)
        others = f"; what is drawn for them ({drawn}) is not what whole batches would have had" if drawn else ""
        self.reporter.note(
            f"warning: out of memory with {_rows(rows)} at a time at step {step}; from here on {_rows(now)}, the same "
            f"rows in each step{others}"
        )
        self.record_micro_batch()

    def record_micro_batch(self) -> None:
        """Have the manifest say how many rows go through the model together, where these are not all of a batch.

        Of a run that is gone on with, and of the best trial of a search, that is what the checkpoint knows of.
        """
        assert self.trainer is not None
        if not (self.run.path / "manifest.json").is_file():  # a trial of a search has none
            return
        entry = None
        if self.trainer.progress.halvings:
            entry = {
                "rows_at_once": self.trainer.rows_at_once,
                "since_step": self.trainer.progress.halved_at,
                "drawn_otherwise": self.trainer.drawn_for_rows,
            }
        if self.run.read("manifest.json").get("micro_batch") != entry:
            self.run.update_manifest(micro_batch=entry)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.ended = time.monotonic()
        self.reporter.finish()


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _ends_epoch(state: TrainerState) -> bool:
    """Whether the last step was the last of its epoch, or of the training."""
    return float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps
