"""TRL's `SFTTrainer`, with the head computed on supervised positions only and no README in every checkpoint."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_optimizer import is_optimizer_factory
from trl import SFTTrainer

from ift_peft.data.render import Rendered
from ift_peft.errors import NonFiniteLoss, RecipeError, RunError, TrainingError
from ift_peft.model.initialise import NAME
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir
from ift_peft.sections import Head, Loss
from ift_peft.train.allocation import orthogonality
from ift_peft.train.batching import Epochs, EpochSampler
from ift_peft.train.checkpoints import PROGRESS, faults_of, rotate, writing
from ift_peft.train.losses import ClassObjective, Objective
from ift_peft.train.progress import Progress

Validate = Callable[[Any], dict[str, float]]  # from a PEFT model to its scores on validation rows


class SupervisedTrainer(SFTTrainer):
    """`SFTTrainer` over rows that hold `input_ids` and `labels`; `epochs` says which of them each epoch takes.

    The loss is TRL's (summed cross-entropy over supervised tokens divided by their number in the whole batch, over all
    accumulation steps) unless `loss` says otherwise; only the positions that predict a supervised token go through the
    language-model head. `teacher` is a model in evaluation mode on the same device; `validate` measures the model on
    validation rows. With a classifier's `head`, rows take the place of supervised tokens. AdaLoRA's penalty is added to
    the loss in training.
    """

    def __init__(
        self,
        *args: Any,
        epochs: Epochs | None = None,
        lengths: Sequence[int] = (),
        loss: Loss | None = None,
        teacher: Any | None = None,
        head: Head = "causal-lm",
        validate: Validate | None = None,
        loraplus_lr_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        if head != "causal-lm":
            kwargs["model"].generation_config = GenerationConfig()  # where TRL writes the pad token
        super().__init__(*args, **kwargs)
        self.validate = validate
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.orth_reg_weight = float(getattr(self.model.peft_config[NAME], "orth_reg_weight", 0.0))
        self.model_accepts_loss_kwargs = True  # our loss divides by the tokens of all accumulation steps
        self.objective = (
            Objective(loss or Loss(), teacher=teacher, autocast=self.accelerator.autocast)
            if head == "causal-lm"
            else ClassObjective(loss or Loss())
        )
        self.epochs = Epochs(rows=len(self.train_dataset)) if epochs is None else epochs
        self.lengths = lengths if len(lengths) else [len(ids) for ids in self.train_dataset["input_ids"]]
        self.remove_callback(PrinterCallback)
        self.progress = Progress()
        self.also_saved: list[Callable[[Path], None]] = []
        self._saved_to: Path | None = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        sums = self.objective(model, inputs, bare=self.model)
        count = sums.tokens if num_items_in_batch is None else num_items_in_batch
        loss = sums.loss / torch.as_tensor(count, device=sums.loss.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if model.training and self.orth_reg_weight:
            penalty = orthogonality(model)
            loss = loss + self.orth_reg_weight * penalty / self.current_gradient_accumulation_steps
            self._metrics["train"]["orthogonality"].append(float(penalty.detach()))
        if model.training:
            self.progress.tokens_seen += int(inputs["attention_mask"].sum())
            self.progress.padded_tokens_seen += inputs["attention_mask"].numel()
            metrics, tokens = self._metrics["train"], max(1, sums.tokens)
            metrics["mean_token_accuracy"].append(float(sums.correct) / tokens)
            for name, part in sums.parts.items() if len(sums.parts) > 1 else ():
                metrics[name].append(float(part) / tokens)
        return (loss, None) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        """As the trainer's own, or with two learning rates (LoRA+, Hayou et al. 2024, arXiv:2402.12354).

        An adapted embedding learns at the rate of A: PEFT's default for it, 1e-6, would hold it still.
        """
        if self.loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & set(arguments):
            raise RecipeError(
                expected="adapter.loraplus_lr_ratio with an optimizer that takes groups of weights",
                found=f"training.optim={self.args.optim}",
                fix="remove training.optim, or adapter.loraplus_lr_ratio",
            )
        self.optimizer: Any = create_loraplus_optimizer(
            self.model,
            kind,
            loraplus_lr_ratio=self.loraplus_lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            loraplus_lr_embedding=arguments["lr"],
            **arguments,
        )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(
            self.lengths,
            self.epochs,
            batch_size=self.args.train_batch_size,
            seed=seed,
            strategy=self.args.train_sampling_strategy,
        )

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **_: Any) -> dict[str, float]:
        """What `validate` finds, under the names that transformers looks for: `eval_loss`, …"""
        assert self.validate is not None  # nothing else asks for an evaluation
        return log_evaluation(self, self.validate, prefix=metric_key_prefix)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The micro-batches of the next step, noted in `progress.order`."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            self.progress.add_rows(batch["input_ids"].cpu().numpy().tobytes())
        return batches, items

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._saved_to or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint that verifies, with `progress` in it and without the pickled arguments; older ones make room.

        Raises `NonFiniteLoss` where weights are not numbers, so that every checkpoint can be gone on from.
        """
        require_finite(self.model)
        folder, state = Path(str(self.args.output_dir)), self.state
        with writing(folder, state.global_step, made_on=made_on(self.args.device)) as partial:
            self._saved_to = partial.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saved_to = None
            (partial / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            if state.best_global_step == state.global_step:  # where it will be
                state.best_model_checkpoint = str(folder / partial.name)
                state.save_to_json(str(partial / "trainer_state.json"))
            for save in self.also_saved:
                save(partial)
            self._take_unlogged()
            (partial / PROGRESS).write_text(json.dumps(self.progress.to_json()), "utf-8")
        rotate(folder, self.args.save_total_limit, best=state.best_global_step)

    def _take_unlogged(self) -> None:
        """Note the sums since the last log: the next line tells of all steps since, also in a process that resumed."""
        self.progress.unlogged = {
            "loss": float(self._tr_loss),
            "total_loss": self._total_loss_scalar,
            "since": self._globalstep_last_logged,
            "metrics": dict(self._metrics["train"]),
        }

    def restore(self, progress: Progress) -> None:
        """Go on counting from `progress`; to be called when training has begun: transformers sets its sums to 0."""
        self.progress = progress
        found = progress.unlogged
        self._tr_loss = torch.tensor(found["loss"], device=self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = found["total_loss"], found["since"]
        self._metrics["train"].update(found["metrics"])

    def _load_best_model(self) -> None:
        """Raises `RunError` where the best checkpoint is not as it was written."""
        best = Path(str(self.state.best_model_checkpoint))
        fault = faults_of(best)
        if fault is not None:
            raise RunError(expected=f"the best checkpoint as it was written, {best}", found=fault, fix="train again")
        super()._load_best_model()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the run writes one card, into the adapter's folder, when there are scores to put in it."""


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


class RunRecorder(TrainerCallback):
    """Writes metrics.jsonl, reports progress, and stops on a loss that is not a number or when asked to."""

    def __init__(self, run: RunDir, reporter: Reporter) -> None:
        self.run, self.reporter = run, reporter
        self.trainer: SupervisedTrainer | None = None
        self.stop_requested = False
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
        self.started = time.monotonic()
        self.reporter.stage("training", state.max_steps)

    @property
    def tokens_per_second(self) -> float:
        assert self.trainer is not None
        seen = self.trainer.progress.tokens_seen - self.seen_before
        return seen / max(1e-9, (self.ended or time.monotonic()) - self.started)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
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
            self.run.append("metrics.jsonl", {"step": state.global_step, **logs})
        if "loss" not in logs:
            return
        self.loss = float(logs["loss"])
        self.run.append(
            "metrics.jsonl",
            {"step": state.global_step, **logs, "tokens_per_second": round(self.tokens_per_second, 1)},
        )
        norm = float(logs.get("grad_norm", 0.0))
        # Under float16 the loss scaler skips steps whose gradient overflows, so an infinite norm is no fault there.
        if not math.isfinite(self.loss) or not (math.isfinite(norm) or args.fp16):
            raise TrainingError(
                expected="a finite loss and gradient",
                found=f"loss {self.loss}, gradient norm {norm} at step {state.global_step}",
                fix="lower training.learning_rate, or look for odd rows; no adapter was written",
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.ended = time.monotonic()
        self.reporter.finish()


def _ends_epoch(state: TrainerState) -> bool:
    """Whether the last step was the last of its epoch, or of the training."""
    return float(state.epoch or 0).is_integer() or state.global_step >= state.max_steps


def to_dataset(rendered: Sequence[Rendered]) -> Dataset:
    """Rendered rows as the columns that the trainer reads."""
    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rendered],
            "labels": [row.labels for row in rendered],
        }
    )


def require_finite(model: Any) -> None:
    """Raises `NonFiniteLoss` where a trained weight is NaN or infinite."""
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not bool(torch.isfinite(p).all())]
    if broken:
        raise NonFiniteLoss(
            expected="finite adapter weights",
            found=f"NaN or infinity in {broken[0]}" + (f" and {len(broken) - 1} more" if len(broken) > 1 else ""),
            fix="lower training.learning_rate; no adapter was written",
        )


def made_on(device: torch.device) -> dict[str, Any]:
    """What, beside versions, decides the last bits of a result: the device and the threads that share its sums."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {
        "device": f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }
