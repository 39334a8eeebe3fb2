"""TRL's `SFTTrainer`, with the head computed on supervised positions only and no README in every checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback
from trl import SFTTrainer

from ift_peft.environment import made_on
from ift_peft.errors import OutOfMemory, RunError, first_line, is_out_of_memory
from ift_peft.model.initialise import NAME
from ift_peft.sections import Head, Loss
from ift_peft.train.allocation import orthogonality
from ift_peft.train.batching import Epochs, EpochSampler
from ift_peft.train.checkpoints import PROGRESS, faults_of, rotate, writing
from ift_peft.train.divergence import Guard
from ift_peft.train.losses import ClassObjective, Objective
from ift_peft.train.method import loraplus_optimizer
from ift_peft.train.offending import left_over, not_finite, require_finite
from ift_peft.train.out_of_memory import Batch, give_memory_back, has_dropout, memory_for, parts_of, whole_or_undone
from ift_peft.train.progress import Progress
from ift_peft.train.step import Step
from ift_peft.train.validation import Validate, log_evaluation

Halved = Callable[[int, int, int], None]  # rows at a time before, from now on, and the step in which that was found out
_LEAST_SCALE = 2.0**-14  # of float16's loss: 30 halvings below where it begins


class SupervisedTrainer(SFTTrainer):
    """`SFTTrainer` over rows that hold `input_ids` and `labels`; `epochs` says which of them each epoch takes.

    The loss is TRL's (summed cross-entropy over supervised tokens divided by their number in the whole batch, over all
    accumulation steps) unless `loss` says otherwise; only the positions that predict a supervised token go through the
    language-model head. `teacher` is a model in evaluation mode on the same device; `validate` measures the model on
    validation rows. With a classifier's `head`, rows take the place of supervised tokens. AdaLoRA's penalty is added to
    the loss in training. Where memory runs out in a micro-batch, it is run in parts from then on, and `halved` is
    told; `where` says where a row of the data set stands.

    Training raises `NonFiniteLoss` and `Diverged` before the step is taken that would do it, and `OutOfMemory` where
    one row at a time is too much.
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
        where: Callable[[int], str] = "row {} of the training rows".format,
        halved: Halved | None = None,
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
        self.where, self.halved = where, halved
        self.unwatched: Callable[[], AbstractContextManager[None]] = nullcontext  # entered for what is no step
        self._step = Step()  # that is being taken

    @property
    def rows_at_once(self) -> int:
        """Rows that go through the model together."""
        return max(1, -(-int(self.args.train_batch_size) // (1 << self.progress.halvings)))

    @property
    def drawn_for_rows(self) -> list[str]:
        """What of training is drawn at random for the rows that go through the model together."""
        noise = ["NEFTune's noise"] if self.args.neftune_noise_alpha else []
        return (["dropout"] if has_dropout(self.model) else []) + noise

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of one micro-batch, in as many parts as its memory asks for.

        All parts are divided by the same number of tokens, so that only the order of summation depends on them.
        """
        self._step.batches.append(inputs)
        while True:
            try:
                return self._in_parts(model, inputs, num_items_in_batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                told = first_line(error)
            self._halve(len(inputs["input_ids"]), told)

    def _in_parts(self, model: Any, inputs: Batch, num_items_in_batch: Tensor | int | None) -> Tensor:
        parts = parts_of(inputs, self.rows_at_once)
        assert len(parts) == 1 or num_items_in_batch is not None  # else each would be divided by its own
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        losses: list[Tensor] = []
        self._step.begin_micro_batch()
        with whole_or_undone(trained, self.args.device):
            for part in parts:
                losses.append(super().training_step(model, dict(part), num_items_in_batch))
        loss = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
        self._step.end_micro_batch(loss, inputs["attention_mask"])
        return loss

    def _halve(self, rows: int, told: str) -> None:
        """Take half as many rows at a time as memory ran out with, from now on."""
        give_memory_back()
        step, tried = self.state.global_step + 1, min(rows, self.rows_at_once)
        if tried == 1:
            raise OutOfMemory(
                expected=f"memory for one row at a time at step {step}",
                found=told,
                fix="lower training.max_length, set training.gradient_checkpointing=true or loss.chunk=256, or choose "
                f"a smaller base; {left_over(Path(str(self.args.output_dir)))}",
            )
        while self.rows_at_once >= tried:
            self.progress.halvings += 1
        self.progress.halved_at = step
        if self.halved is not None:
            self.halved(tried, self.rows_at_once, step)

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
        penalty = None
        if model.training and self.orth_reg_weight and self._step.in_first_part:  # once for a micro-batch
            penalty = orthogonality(model)
            loss = loss + self.orth_reg_weight * penalty / self.current_gradient_accumulation_steps
            penalty = penalty.detach()
        if model.training:
            self._step.add_part(sums, penalty)
        return (loss, None) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the whole step's gradient, which is checked with its loss: the weights are still those before."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._end_step(model, norm)
        return norm

    def _end_step(self, model: Any, norm: Any) -> None:
        step, self._step = self._step, Step()
        found = step.read(torch.as_tensor(norm), self.args.device)
        self.progress.tokens_seen += found.read
        self.progress.padded_tokens_seen += found.padded
        for name, values in found.metrics.items():
            self._metrics["train"][name] += values
        if not math.isfinite(found.loss) or not (math.isfinite(found.norm) or self._skipped_by_scaler()):
            raise not_finite(self, model, step.batches, loss=found.loss, norm=found.norm)
        at = self.state.global_step + 1
        self.guard.add(self.progress, found.cross_entropy / max(1, found.tokens), tokens=found.tokens, step=at)

    def _skipped_by_scaler(self) -> bool:
        """Whether a gradient that is not finite is float16's: the scaler of the loss skips the step, and scales less.

        Where that has brought it to next to nothing, the gradient is not finite by itself.
        """
        scaler = self.accelerator.scaler
        return bool(self.args.fp16) and scaler is not None and scaler.get_scale() > _LEAST_SCALE

    @cached_property
    def guard(self) -> Guard:
        """What looks whether training diverges."""
        config = self.model.config
        classes = isinstance(self.objective, ClassObjective)
        choices = config.num_labels if classes else config.get_text_config().vocab_size
        shuffled = (
            self.args.train_sampling_strategy != "sequential" and getattr(self.objective, "teacher", None) is None
        )
        return Guard(int(choices), self.state.max_steps, shuffled=shuffled)

    def create_optimizer(self, model: Any = None) -> Any:
        """As the trainer's own, or LoRA+'s."""
        if self.loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer: Any = loraplus_optimizer(self.model, self.args, kind, arguments, ratio=self.loraplus_lr_ratio)
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
        less = "lower evaluation.per_device_eval_batch_size"
        with self.unwatched(), memory_for("measuring on the validation rows", fix=less):
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
        folder, state = Path(str(self.args.output_dir)), self.state
        require_finite(self.model, step=state.global_step, checkpoints=folder)
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
