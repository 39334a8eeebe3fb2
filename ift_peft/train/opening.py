"""What a training begins with: the base loaded, a new adapter laid over it, and the trainer of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers import EarlyStoppingCallback, TrainerCallback

from ift_peft.data.fit import Fitted
from ift_peft.data.store import to_dataset
from ift_peft.errors import RecipeError, first_line
from ift_peft.evaluate.measure import resampling
from ift_peft.infer.load import class_head
from ift_peft.model.base import LoadedBase, load_section
from ift_peft.recipe import Recipe
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir
from ift_peft.train.arguments import arguments_of
from ift_peft.train.losses import find_teacher
from ift_peft.train.method import adapter_config, allocation_of, begin
from ift_peft.train.out_of_memory import memory_for
from ift_peft.train.prepare import Prepared
from ift_peft.train.recorder import RunRecorder
from ift_peft.train.session import LESS_TRAINED, Session, resume_command
from ift_peft.train.trainer import SupervisedTrainer
from ift_peft.train.validation import BestCheckpoint, Validator
from ift_peft.train.watchdog import Watchdog

_SMALLER_BASE = "set base.quantization=nf4, or choose a smaller base"


def open_session(
    recipe: Recipe,
    prepared: Prepared,
    run: RunDir,
    reporter: Reporter,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    start_from: Path | None = None,
    resumed: Path | None = None,
    go_on: str | None = None,
    step_timeout: float | None = None,
) -> Session:
    """Load the base and lay a new adapter over it, ready to train in the folder of `run`.

    The adapter begins with the weights of the one in the folder `start_from`, where that is given; `resumed` is the
    checkpoint that will be gone on from, so that nothing is computed that is loaded from there. `go_on` is the
    command to tell after a signal, by default the one that resumes `run`. `step_timeout`: see `Watchdog`.
    """
    with memory_for("the base", fix=_SMALLER_BASE):
        base = load_section(prepared.location, recipe.base, head=class_head(recipe, prepared.tokenizer))
    for note in (*prepared.notes, *base.notes):
        reporter.note(note)
    recorder = RunRecorder(run, reporter)
    command = go_on or resume_command(run)
    watchdog = Watchdog(run, reporter, limit=step_timeout, go_on=command)
    validator = None if prepared.validation is None else _validator(recipe, prepared, prepared.validation)
    begun = resumed or start_from
    with memory_for("base, teacher and adapter", fix=f"{LESS_TRAINED}, or {_SMALLER_BASE}"):
        trainer = _build_trainer(recipe, prepared, base, run, recorder, validator=validator, begun=begun)
        frozen = begin(trainer.model, recipe, prepared, begun=begun is not None)
    allocation = allocation_of(trainer.model, recipe)
    if allocation is not None:
        trainer.add_callback(allocation)
        trainer.also_saved.append(allocation.save)
    trainer.unwatched = watchdog.paused
    for callback in (*callbacks, watchdog):
        trainer.add_callback(callback)
    if start_from is not None:
        trainer.model.load_adapter(str(start_from), "default", is_trainable=True)
    session = Session(
        recipe, prepared, run, reporter, base, recorder, trainer, validator, command, watchdog, allocation, frozen
    )
    trained, every = session.parameters
    reporter.note(f"{trained:,} of {every:,} parameters are trained ({100 * trained / every:.2f} %)")
    return session


def _validator(recipe: Recipe, prepared: Prepared, rows: Fitted) -> Validator:
    section = recipe.evaluation
    return Validator(
        prepared.renderer,
        rows.rows,
        recipe.data.label_words,
        batch_size=section.per_device_eval_batch_size,
        resampling=resampling(section),
    )


def _build_trainer(
    recipe: Recipe,
    prepared: Prepared,
    base: LoadedBase,
    run: RunDir,
    recorder: RunRecorder,
    *,
    validator: Validator | None,
    begun: Path | None,
) -> SupervisedTrainer:
    arguments = arguments_of(
        recipe,
        output_dir=run.checkpoints,
        device=base.device,
        compute_dtype=base.compute_dtype,
        max_length=prepared.max_length,
    )
    location = find_teacher(recipe.loss, prepared.tokenizer, max_length=prepared.max_length)
    teacher = None if location is None else load_section(location, recipe.base).model
    transformers.set_seed(arguments.seed)
    try:
        trainer = SupervisedTrainer(
            model=base.model,
            args=arguments,
            eval_dataset=None if prepared.validation is None else to_dataset(prepared.validation.rendered),
            train_dataset=prepared.train.dataset.select_columns(["input_ids", "labels"]),
            processing_class=prepared.tokenizer,
            peft_config=adapter_config(recipe, prepared, base, begun=begun),
            callbacks=[recorder],
            epochs=prepared.epochs,
            lengths=prepared.lengths,
            loss=recipe.loss,
            teacher=teacher,
            validate=validator,
            loraplus_lr_ratio=recipe.adapter.loraplus_lr_ratio,
            head=recipe.base.head,
            where=prepared.train.where,
            halved=recorder.halved,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise RecipeError(
            expected="a recipe that SFTTrainer takes", found=first_line(error), fix="change the setting named there"
        ) from error
    recorder.trainer = trainer
    trainer.also_saved.append(recorder.keep_lines)
    if validator is not None and recipe.validation is not None:
        trainer.add_callback(BestCheckpoint(validator, recorder.reporter.note))
        if recipe.validation.patience is not None:
            trainer.add_callback(EarlyStoppingCallback(recipe.validation.patience, recipe.validation.min_delta))
    return trainer
