"""TRL's `SFTTrainer`, with the head computed on supervised positions only and no README in every checkpoint."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from transformers import GenerationConfig
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_optimizer import is_optimizer_factory
from trl import SFTTrainer

from ift_peft.data.render import Rendered
from ift_peft.errors import OutOfMemory, RecipeError, RunError, first_line, is_out_of_memory
from ift_peft.model.initialise import NAME
from ift_peft.sections import Head, Loss
from ift_peft.train.allocation import orthogonality
from ift_peft.train.batching import Epochs, EpochSampler
from ift_peft.train.checkpoints import PROGRESS, faults_of, rotate, writing
from ift_peft.train.divergence import Guard
from ift_peft.train.losses import ClassObjective, Objective, Sums
from ift_peft.train.offending import left_over, not_finite, require_finite
from ift_peft.train.out_of_memory import Batch, give_memory_back, has_dropout, memory_for, parts_of, whole_or_undone
from ift_peft.train.progress import Progress

Halved = Callable[[int, int, int], None]  # rows at a time before, from now on, and the step in which that was found out
_LEAST_SCALE = 2.0**-14  # of float16's loss: 30 halvings below where it begins
Validate = Callable[[Any], dict[str, float]]  # from a PEFT model to its scores on validation rows


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward of a step came to, in one part or several; tensors are single numbers.

    Nothing of it is read before the step ends, and then all at once: reading waits for the device.
    """

    loss: Tensor
    read: Tensor
    correct: Tensor
    penalty: Tensor | None
    parts: dict[str, Tensor]
    tokens: int
    padded: int

    @property
    def numbers(self) -> list[Tensor]:
        own = [self.loss, self.read, self.correct, *self.parts.values()]
        return own if self.penalty is None else [*own, self.penalty]


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
        self._batches: list[Batch] = []  # of the step that is being taken
        self._micro_batches: list[MicroBatch] = []
        self._sums: list[tuple[Sums, Tensor | None]] = []  # of the parts of the micro-batch that is being run

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
        self._batches.append(inputs)
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
        self._sums.clear()
        with whole_or_undone(trained, self.args.device):
            for part in parts:
                losses.append(super().training_step(model, dict(part), num_items_in_batch))
        loss = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
        sums = [one for one, _ in self._sums]
        mask = inputs["attention_mask"]
        micro_batch = MicroBatch(
            loss,
            mask.sum(),
            torch.stack([one.correct for one in sums]).sum(),
            self._sums[0][1],
            {name: torch.stack([one.parts[name] for one in sums]).sum() for name in sums[0].parts},
            sum(one.tokens for one in sums),
            mask.numel(),
        )
        self._sums.clear()
        self._micro_batches.append(micro_batch)
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
        if model.training and self.orth_reg_weight and not self._sums:  # once for a micro-batch, in its first part
            penalty = orthogonality(model)
            loss = loss + self.orth_reg_weight * penalty / self.current_gradient_accumulation_steps
            penalty = penalty.detach()
        if model.training:
            self._sums.append((replace(sums, loss=sums.loss.detach()), penalty))
        return (loss, None) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the whole step's gradient, which is checked with its loss: the weights are still those before."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._end_step(model, norm)
        return norm

    def _end_step(self, model: Any, norm: Any) -> None:
        batches, done = self._batches, self._micro_batches
        self._batches, self._micro_batches = [], []
        numbers = [torch.as_tensor(norm), *(number for one in done for number in one.numbers)]
        found = torch.stack([number.detach().to(self.args.device, torch.float64) for number in numbers]).tolist()
        size = found.pop(0)
        loss = entropy = 0.0
        metrics = self._metrics["train"]
        for one in done:
            mine, found = found[: len(one.numbers)], found[len(one.numbers) :]
            loss += mine[0]
            entropy += mine[3]  # the first part of a loss is its cross-entropy
            self.progress.tokens_seen += int(mine[1])
            self.progress.padded_tokens_seen += one.padded
            tokens = max(1, one.tokens)
            metrics["mean_token_accuracy"].append(mine[2] / tokens)
            for name, part in zip(one.parts, mine[3:], strict=False) if len(one.parts) > 1 else ():
                metrics[name].append(part / tokens)
            if one.penalty is not None:
                metrics["orthogonality"].append(mine[-1])
        if not math.isfinite(loss) or not (math.isfinite(size) or self._skipped_by_scaler()):
            raise not_finite(self, model, batches, loss=loss, norm=size)
        tokens = sum(one.tokens for one in done)
        self.guard.add(self.progress, entropy / max(1, tokens), tokens=tokens, step=self.state.global_step + 1)

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


def to_dataset(rendered: Sequence[Rendered]) -> Dataset:
    """Rendered rows as the columns that the trainer reads."""
    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rendered],
            "labels": [row.labels for row in rendered],
        }
    )


def made_on(device: torch.device) -> dict[str, Any]:
    """What, beside versions, decides the last bits of a result: the device and the threads that share its sums."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {
        "device": f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }
