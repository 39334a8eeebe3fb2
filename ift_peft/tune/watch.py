"""Inside a trial: each measurement goes to the study, and training is stopped where it is not worth going on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optuna.trial import Trial
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ift_peft.evaluate import metrics
from ift_peft.train.session import Session
from ift_peft.tune.budget import Budget


class TrialWatcher(TrainerCallback):
    """Reports a trial's validation scores, counts what it spends, and ends it.

    `ended` is the reason why it was stopped: `pruned`, or the name of a limit. It is stored with the trial before the
    checkpoint is written; a trial that goes on from an earlier checkpoint comes to the same measurement again.
    `offset` measurements were made in the trial that this one continues.
    """

    def __init__(self, trial: Trial, budget: Budget, *, prune: bool, offset: int, note: Callable[[str], None]) -> None:
        self.trial, self.budget, self.prune, self.offset, self.note = trial, budget, prune, offset, note
        self.session: Session | None = None
        self.ended: str | None = None
        self.counted = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.session is not None
        self.counted = self.session.trainer.progress.tokens_seen  # those before were counted when they were taken

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.session is not None
        seen = self.session.trainer.progress.tokens_seen
        self.budget.spend(seen - self.counted)
        self.counted = seen
        limit = self.budget.exceeded(0)
        if limit is not None and state.global_step < state.max_steps:
            self._end(state, control, limit)
            control.should_save = True
            control.should_evaluate = state.best_metric is None  # else it counts with its best score so far

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.ended is not None:
            control.should_evaluate = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.session is not None and self.session.validator is not None
        validator = self.session.validator
        scores = validator.scores
        self.budget.reserve = (
            validator.seconds / validator.measured / len(validator.rows) * _rows_at_the_end(self.session)
        )
        metric = str(args.metric_for_best_model)
        value = scores[metric].value
        number = self.offset + measured(state)
        better = state.best_metric is None or (
            value > state.best_metric if args.greater_is_better else value < state.best_metric
        )
        if better:
            self.trial.set_user_attr("scores", metrics.to_json(scores))
        self.trial.set_user_attr("improving", better)
        self.trial.set_user_attr("measurements", number)
        if number not in self.trial.study.trials[self.trial.number].intermediate_values:
            self.trial.report(value, number)
        self.budget.write()  # before the checkpoint: steps that are not taken again have been counted
        more = self.ended is None and state.global_step < state.max_steps
        if self.prune and more and self.trial.should_prune():
            self._end(state, control, "pruned")

    def _end(self, state: TrainerState, control: TrainerControl, why: str) -> None:
        self.ended = why
        self.trial.set_user_attr("ended", {"why": why, "step": state.global_step})
        self.budget.write()
        control.should_training_stop = True
        self.note(f"trial {self.trial.number} is stopped after step {state.global_step}: {why}")


def measured(state: TrainerState) -> int:
    """How often the model was measured on validation rows so far."""
    return sum("eval_loss" in entry for entry in state.log_history)


def _rows_at_the_end(session: Session) -> int:
    """Rows that base and adapter are measured on when the search is over."""
    prepared = session.prepared
    return 2 * (len(prepared.test.rows) + sum(len(probe.rows) for probe in prepared.probes))
