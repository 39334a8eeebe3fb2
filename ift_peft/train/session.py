"""One training: a base with a new adapter, trained to its end, to early stopping or to a signal, and its best kept."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any

from transformers import TrainerState

from ift_peft.errors import IftPeftError, RunError, TrainingError, first_line
from ift_peft.model.base import LoadedBase
from ift_peft.recipe import Recipe
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir
from ift_peft.train.allocation import RankAllocation
from ift_peft.train.checkpoints import newest_verified, step_of
from ift_peft.train.offending import require_finite
from ift_peft.train.out_of_memory import memory_for
from ift_peft.train.prepare import Prepared
from ift_peft.train.recorder import RunRecorder
from ift_peft.train.resuming import read_progress
from ift_peft.train.signals import handling
from ift_peft.train.trainer import SupervisedTrainer
from ift_peft.train.validation import (
    Validator,
    best_of,
    point_to_best,
    ran_out_of_patience,
    stopped_early,
)
from ift_peft.train.watchdog import Watchdog

LESS_TRAINED = "lower adapter.r or adapter.target_modules"


class Interrupted(TrainingError):
    """Training stopped by Ctrl-C or SIGTERM, with a checkpoint to go on from."""

    exit_code = 130
    status = "interrupted"


@dataclass
class Session:
    """A base with its adapter, and the trainer over both. `recipe` is what it was built from."""

    recipe: Recipe
    prepared: Prepared
    run: RunDir
    reporter: Reporter
    base: LoadedBase
    recorder: RunRecorder
    trainer: SupervisedTrainer
    validator: Validator | None
    go_on: str
    """The command that goes on with it after a signal."""
    watchdog: Watchdog
    allocation: RankAllocation | None = None
    frozen: int = 0
    """Weights of the adapter that stay as they began."""

    @property
    def model(self) -> Any:
        return self.trainer.model

    @property
    def notes(self) -> list[str]:
        return [*self.prepared.notes, *self.base.notes]

    @property
    def parameters(self) -> tuple[int, int]:
        """Trained, and all."""
        trained, every = self.model.get_nb_trainable_parameters()
        return int(trained) - self.frozen, int(every)

    def fit(self, checkpoint: Path | None) -> None:
        """Train from `checkpoint`, or from the start, and leave the model with the weights that are kept.

        These are the last ones, or with validation those of the best checkpoint. Where training had ended in the
        checkpoint, at its last step or by early stopping, nothing more is trained. Raises `Interrupted` after a
        signal, and `TrainingError` for weights that are not finite and for what the trainer breaks off with.
        """
        if checkpoint is not None and _had_ended(checkpoint):
            self.take(checkpoint)
            return
        if checkpoint is not None and self.allocation is not None:
            self.allocation.restore(checkpoint)
        if checkpoint is not None:
            self.recorder.resumed = read_progress(checkpoint)
        self._train(checkpoint)
        state = self.trainer.state
        if self.recorder.stop_requested and state.global_step < state.max_steps and not stopped_early(self.trainer):
            raise Interrupted(
                expected=f"{state.max_steps} steps",
                found=f"a signal after step {state.global_step}; a checkpoint was saved",
                fix=f"go on with: {self.go_on}",
            )
        self._check_and_unwrap()

    def stop_before_measuring(self) -> None:
        """Raises `Interrupted` where a signal came too late to end training early, and its end is in a checkpoint."""
        if not self.recorder.stop_requested:
            return
        step = self.trainer.state.global_step
        newest, _ = newest_verified(self.run.checkpoints)
        if newest is not None and step_of(newest) == step:
            raise Interrupted(
                expected="base and adapter to be measured",
                found=f"a signal after the last step, {step}; a checkpoint was saved",
                fix=f"go on with: {self.go_on}",
            )

    def _train(self, checkpoint: Path | None) -> None:
        try:
            with (
                stopping_on_signals(self.recorder),
                self.watchdog.watching(),
                memory_for("the optimizer and checkpoints", fix=LESS_TRAINED),
            ):
                self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except IftPeftError:
            raise
        except (UnpicklingError, EOFError) as error:  # what torch says of it is how to run what is in there
            raise RunError(
                expected=f"tensors and numbers in the pickled files of {checkpoint}",
                found="something else, which was not run",
                fix="train again; a checkpoint from elsewhere is no part of this run",
            ) from error
        except (ValueError, RuntimeError, ImportError, TypeError) as error:  # settings are read as late as in there
            raise TrainingError(
                expected="a recipe that can be trained", found=first_line(error), fix="change the setting named there"
            ) from error

    def take(self, checkpoint: Path) -> None:
        """Leave the model with the weights that training which ended in `checkpoint` kept, without a further step."""
        self.trainer.progress = read_progress(checkpoint)
        self.recorder.seen_before = self.trainer.progress.tokens_seen
        self.recorder.record_micro_batch()
        self.trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        point_to_best(self.trainer.state, checkpoint.parent)
        self.trainer.state.best_model_checkpoint = self.trainer.state.best_model_checkpoint or str(checkpoint)
        self.trainer._load_best_model()
        self._check_and_unwrap()

    def _check_and_unwrap(self) -> None:
        if self.validator is not None:
            best, state = best_of(self.trainer), self.trainer.state
            early = "stopped early after" if self.stopped_early else "after"
            self.reporter.note(
                f"{early} {state.global_step} steps; the adapter is that of step {best['step']}, "
                f"validation {best['metric']} {best['value']:.4f}"
            )
        step = self.trainer.state.global_step
        require_finite(self.model, step=step, checkpoints=self.run.checkpoints)
        self.trainer.guard.require_learned(self.trainer.progress, step=step)
        # The trainer wrapped the forward in autocast; before and after must be measured in the same arithmetic.
        self.trainer.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def outcome(self) -> dict[str, Any]:
        """What the manifest says of training: `steps`, and with validation `best` and `stopped_early`."""
        state = self.trainer.state
        if self.validator is None:
            return {"steps": state.global_step}
        return {"steps": state.global_step, "best": best_of(self.trainer), "stopped_early": self.stopped_early}

    @property
    def stopped_early(self) -> bool:
        """Whether patience ended training, in this process or before the checkpoint that was taken."""
        return stopped_early(self.trainer) or ran_out_of_patience(self.trainer.state)


def _had_ended(checkpoint: Path) -> bool:
    """Whether training had ended in `checkpoint`: transformers takes a step before it looks at how many there are."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state.global_step >= state.max_steps or ran_out_of_patience(state)


def resume_command(run: RunDir) -> str:
    return f"ift train --resume {os.path.relpath(run.path)}"


@contextmanager
def stopping_on_signals(recorder: RunRecorder) -> Iterator[None]:
    """Let the first Ctrl-C, SIGTERM or SIGHUP end training after its step with a checkpoint, the second at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if recorder.stop_requested:
            raise KeyboardInterrupt
        recorder.stopped_by = signal.Signals(number).name  # told later: what was interrupted may be telling something

    with handling(stop):
        yield
