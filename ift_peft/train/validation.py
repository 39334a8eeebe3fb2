"""Measuring on validation rows during training: the scores, when to stop, and which checkpoint is the best."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ift_peft.data.render import TokenRenderer
from ift_peft.data.row import Row
from ift_peft.errors import TrainingError
from ift_peft.evaluate.calibration import nll_rows
from ift_peft.evaluate.compare import Predictions, predict_rows
from ift_peft.evaluate.intervals import bootstrap_mean_ratio, percentile
from ift_peft.evaluate.metrics import Metrics, Resampling, classification_metrics, confusion, language_metrics
from ift_peft.evaluate.rowwise import with_ones

Validate = Callable[[Any], dict[str, float]]  # from a PEFT model to its scores on validation rows


@dataclass
class Validator:
    """Measures a PEFT model on validation rows, with the code that measures it on the held-out ones.

    `scores` are those of the last measurement, `seconds` what all of them took, `measured` how many there were.
    """

    renderer: TokenRenderer
    rows: Sequence[Row]
    labels: Sequence[str]
    batch_size: int
    resampling: Resampling
    scores: Metrics = field(default_factory=dict)
    seconds: float = 0.0
    measured: int = 0

    def __call__(self, model: Any) -> dict[str, float]:
        started = time.monotonic()
        predictions = predict_rows(
            model, self.renderer, self.rows, self.labels, batch_size=self.batch_size, adapter=True
        )
        self.scores = validation_scores(self.rows, self.labels, predictions, self.resampling)
        self.seconds += time.monotonic() - started
        self.measured += 1
        return {name: estimate.value for name, estimate in self.scores.items()}


def validation_scores(
    rows: Sequence[Row], labels: Sequence[str], predictions: Predictions, resampling: Resampling
) -> Metrics:
    """accuracy, precision, recall, f1 and loss of labels; loss and perplexity of answers. Each with its interval.

    The loss of labels is the mean negative log probability of the true class among the classes.
    """
    if not labels:
        assert predictions.log_probabilities is not None and predictions.tokens is not None
        return language_metrics(predictions.log_probabilities, predictions.tokens, resampling)
    assert predictions.probabilities is not None
    truth = [labels.index(row.answer) for row in rows]
    found = classification_metrics(confusion(truth, predictions.chosen, len(labels)), resampling)
    sums = with_ones(nll_rows(truth, predictions.probabilities))
    value, drawn = bootstrap_mean_ratio(sums[:, 0], sums[:, 1], samples=resampling.samples, seed=resampling.seed)
    return {**found, "loss": percentile(value, drawn, confidence=resampling.confidence)}


def log_evaluation(trainer: Any, validate: Validate, *, prefix: str) -> dict[str, float]:
    """Measure a trainer's model with `validate` and tell log and callbacks, as `Trainer.evaluate` does."""
    model = trainer.model
    was_training = model.training
    model.eval()
    with without_autocast(model):
        metrics = {f"{prefix}_{name}": value for name, value in validate(model).items()}
    trainer.log(dict(metrics))  # in evaluation mode, so that TRL does not take the sums of the training steps for ours
    model.train(was_training)
    trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
    return metrics


@contextmanager
def without_autocast(model: Any) -> Iterator[None]:
    """The model's own forward: accelerate lays one in autocast over it, and scores before and after are without."""
    wrapped = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


class BestCheckpoint(TrainerCallback):
    """Finds the best checkpoint again when a run goes on, also from another folder, and tells of each measurement."""

    def __init__(self, validator: Validator, note: Callable[[str], None]) -> None:
        self.validator, self.note = validator, note

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        point_to_best(state, Path(str(args.output_dir)))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        metric = str(args.metric_for_best_model)
        found = self.validator.scores[metric]
        self.note(
            f"validation at step {state.global_step}: {metric} {found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"
        )


def point_to_best(state: TrainerState, checkpoints: Path) -> None:
    """Make a state that was read from a checkpoint name the best one by where it is now.

    transformers stores its path, and goes on without it where it has moved. It was verified with the one that is gone
    on from, and is again when it is loaded.
    """
    if state.best_global_step:
        state.best_model_checkpoint = str(checkpoints / f"checkpoint-{state.best_global_step}")


def ran_out_of_patience(state: TrainerState) -> bool:
    """Whether the state in a checkpoint says that early stopping had ended training there."""
    stored = state.stateful_callbacks.get("EarlyStoppingCallback")
    if not stored:
        return False
    one = stored[0] if isinstance(stored, list) else stored
    return bool(one["attributes"]["early_stopping_patience_counter"] >= one["args"]["early_stopping_patience"])


def stopped_early(trainer: Any) -> bool:
    """Whether early stopping has ended a trainer's training."""
    return any(
        callback.early_stopping_patience_counter >= callback.early_stopping_patience
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, EarlyStoppingCallback)
    )


def best_of(trainer: Any) -> dict[str, Any]:
    """Step, metric and value of the best checkpoint, whose weights the model has after training.

    Raises `TrainingError` where transformers did not load it.
    """
    state: TrainerState = trainer.state
    if state.best_global_step is None:
        raise TrainingError(
            expected="a best checkpoint to take the adapter from",
            found=f"none after {state.global_step} steps",
            fix="train again, with validation.every of at most that many steps",
        )
    metric = str(trainer.args.metric_for_best_model)
    return {"step": state.best_global_step, "metric": metric, "value": round(float(state.best_metric), 6)}
