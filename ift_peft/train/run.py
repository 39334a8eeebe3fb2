"""One run, from a recipe to a run folder: read, render, measure the base, train, measure the adapter, write it down."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import transformers
from transformers import PreTrainedModel
from trl import SFTConfig

from ift_peft.errors import RecipeError, RunError, TrainingError, first_line
from ift_peft.evaluate.compare import compare, prediction_lines
from ift_peft.evaluate.forgetting import general_texts
from ift_peft.evaluate.gates import target_gates
from ift_peft.evaluate.run import forgotten, measure, measure_general, measure_probes, resampling
from ift_peft.model.adapter import lora_config
from ift_peft.model.base import LoadedBase, choose_device, choose_dtype, load_section, quiet
from ift_peft.model.memory import Meter
from ift_peft.recipe import Recipe
from ift_peft.report.write import write_report
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir, RunIsBusy, create_run
from ift_peft.train.arguments import sft_config
from ift_peft.train.card import adapter_card
from ift_peft.train.checkpoints import newest_complete
from ift_peft.train.losses import find_teacher
from ift_peft.train.memory import foresee_memory
from ift_peft.train.prepare import Prepared, inputs, prepare, record_inputs
from ift_peft.train.trainer import RunRecorder, SupervisedTrainer, non_finite


class Interrupted(TrainingError):
    """Training stopped by Ctrl-C or SIGTERM, with a checkpoint to go on from."""

    exit_code = 130


def train(recipe: Recipe, *, root: Path, reporter: Reporter) -> RunDir:
    """Run `recipe` and return its folder below `root`.

    Raises `RecipeError`, `DataError` or `ModelError` before a run folder exists, `TrainingError` for a run that could
    not finish, and `Interrupted` after a signal.
    """
    prepared = prepare(recipe, reporter)
    device = choose_device(recipe.base.device)
    dtype = choose_dtype(recipe.base.compute_dtype, device)
    sft_config(recipe.training, output_dir=root, device=device, compute_dtype=dtype, max_length=prepared.max_length)
    general_texts(recipe.evaluation)  # read again when they are measured; what is wrong with them is told now
    given = _inputs(recipe, prepared)
    run = create_run(recipe, root)
    record_inputs(run, prepared, given)
    return _run(recipe, prepared, run, reporter, checkpoint=None)


def resume(run: RunDir, *, reporter: Reporter) -> RunDir:
    """Go on with an unfinished run from its newest complete checkpoint, or from its start if it has none.

    Raises `RunError` for a run that succeeded, and where rows, base, template or teacher are no longer those it began
    with.
    """
    with run.locked():
        pass  # refused at once where another process is at it
    if run.status == "succeeded":
        raise RunError(expected="an unfinished run", found=f"{run.path} has succeeded", fix="train again: ift train")
    recipe = run.recipe()
    prepared = prepare(recipe, reporter)
    recorded, now = run.read("manifest.json").get("inputs"), _inputs(recipe, prepared)
    if recorded is None:
        raise RunError(
            expected="a run that got as far as its rows", found=f"none recorded in {run.path}", fix="start a new run"
        )
    changed = [name for name, value in now.items() if recorded.get(name) != value]
    if changed:
        raise RunError(
            expected="the rows, base, template and teacher that the run began with",
            found=f"other values of {', '.join(changed)}",
            fix="restore them, or start a new run",
        )
    checkpoint, skipped = newest_complete(run.checkpoints)
    for line in skipped:
        reporter.note(line)
    reporter.note(
        f"resuming from {checkpoint.name}" if checkpoint else "no complete checkpoint; starting from the first step"
    )
    _forget_steps_after(run, int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    run.update_manifest(status="running", error=None, resumed_from=checkpoint.name if checkpoint else None)
    return _run(recipe, prepared, run, reporter, checkpoint=checkpoint)


def _inputs(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """The inputs of a run by hash, its teacher's among them. Raises `ModelError` for a teacher that cannot be used."""
    teacher = find_teacher(recipe.loss, prepared.tokenizer, max_length=prepared.max_length)
    return inputs(prepared) | ({"teacher_fingerprint": teacher.fingerprint()} if teacher else {})


def _forget_steps_after(run: RunDir, step: int) -> None:
    """Steps after the checkpoint are taken again, and logged again."""
    path = run.path / "metrics.jsonl"
    if path.is_file():
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        run.write_lines(path.name, [line for line in lines if line["step"] <= step])


def _run(recipe: Recipe, prepared: Prepared, run: RunDir, reporter: Reporter, *, checkpoint: Path | None) -> RunDir:
    started = time.monotonic()
    try:
        with quiet(), run.locked():
            _train_and_measure(recipe, prepared, run, reporter, checkpoint)
    except (Interrupted, KeyboardInterrupt) as error:
        run.update_manifest(status="interrupted")
        if isinstance(error, Interrupted):
            raise
        raise Interrupted(
            expected="a run that ends by itself", found="it was interrupted", fix=f"go on with: {_resume_command(run)}"
        ) from None
    except RunIsBusy:
        raise
    except BaseException as error:
        run.update_manifest(status="failed", error=f"{type(error).__name__}: {error}"[:2000])
        raise
    finished = datetime.now().astimezone().isoformat(timespec="seconds")
    run.update_manifest(status="succeeded", finished=finished, seconds=round(time.monotonic() - started, 1))
    write_report(run)
    return run


def _train_and_measure(
    recipe: Recipe, prepared: Prepared, run: RunDir, reporter: Reporter, checkpoint: Path | None
) -> None:
    foreseen = foresee_memory(recipe, prepared, reporter)
    base = load_section(prepared.location, recipe.base)
    for note in (*prepared.notes, *base.notes):
        reporter.note(note)
    recorder = RunRecorder(run, reporter)
    trainer = _build_trainer(recipe, prepared, base, run, recorder)
    parameters = trainer.model.get_nb_trainable_parameters()
    reporter.note(
        f"{parameters[0]:,} of {parameters[1]:,} parameters are trained ({100 * parameters[0] / parameters[1]:.2f} %)"
    )
    rows, labels = prepared.test.rows, recipe.data.label_words
    measuring = partial(measure, trainer.model, prepared.renderer, rows, labels, recipe.evaluation, reporter=reporter)
    general = partial(measure_general, trainer.model, prepared.tokenizer, recipe.evaluation, reporter=reporter)
    before, general_before = measuring(adapter=False), general(adapter=False)
    meter = Meter(base.device)
    with stopping_on_signals(recorder):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    memory = foreseen | meter.read()
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            expected=f"{trainer.state.max_steps} steps",
            found=f"a signal after step {trainer.state.global_step}; a checkpoint was saved",
            fix=f"go on with: {_resume_command(run)}",
        )
    broken = non_finite(trainer.model)
    if broken:
        raise TrainingError(
            expected="finite adapter weights",
            found=f"NaN or infinity in {broken[0]}",
            fix="lower training.learning_rate",
        )
    # The trainer wrapped the model's forward in autocast; before and after must be measured in the same arithmetic.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    after = measuring(adapter=True)
    scores = compare(rows, labels, before, after, resampling(recipe.evaluation))
    scores |= measure_probes(
        trainer.model, prepared.renderer, prepared.probes, labels, recipe.evaluation, reporter=reporter, run=run
    )
    scores |= forgotten(recipe.evaluation, general_before, general(adapter=True))
    scores["gates"] = target_gates(recipe.evaluation, scores)
    run.write("scores.json", scores)
    run.write_lines("predictions.jsonl", prediction_lines(rows, labels, before, after))
    _save_adapter(trainer, recipe, prepared, run, scores)
    run.update_manifest(
        notes=[*prepared.notes, *base.notes],
        parameters={"trained": parameters[0], "all": parameters[1]},
        steps=trainer.state.global_step,
        memory=memory,
    )
    if trainer.tokens_seen:  # nothing is trained when a run resumes after its last step
        run.update_manifest(
            tokens_per_second=round(recorder.tokens_per_second, 1),
            padding_share=round(1 - trainer.tokens_seen / trainer.padded_tokens_seen, 4),
        )


def _resume_command(run: RunDir) -> str:
    return f"ift train --resume {os.path.relpath(run.path)}"


def _build_trainer(
    recipe: Recipe, prepared: Prepared, base: LoadedBase, run: RunDir, recorder: RunRecorder
) -> SupervisedTrainer:
    arguments = sft_config(
        recipe.training,
        output_dir=run.checkpoints,
        device=base.device,
        compute_dtype=base.compute_dtype,
        max_length=prepared.max_length,
    )
    location = find_teacher(recipe.loss, prepared.tokenizer, max_length=prepared.max_length)
    teacher = None if location is None else load_section(location, recipe.base).model
    transformers.set_seed(arguments.seed)
    try:
        trainer = _trainer(recipe, prepared, base, arguments, recorder, teacher=teacher)
    except (ValueError, RuntimeError, ImportError) as error:
        raise RecipeError(
            expected="a recipe that SFTTrainer takes", found=first_line(error), fix="change the setting named there"
        ) from error
    recorder.trainer = trainer
    return trainer


def _trainer(
    recipe: Recipe,
    prepared: Prepared,
    base: LoadedBase,
    arguments: SFTConfig,
    recorder: RunRecorder,
    *,
    teacher: PreTrainedModel | None,
) -> SupervisedTrainer:
    return SupervisedTrainer(
        model=base.model,
        args=arguments,
        train_dataset=prepared.train.dataset.select_columns(["input_ids", "labels"]),
        processing_class=prepared.tokenizer,
        peft_config=lora_config(
            recipe.adapter,
            base.model,
            base_name=str(prepared.location.folder),
            revision=prepared.location.revision,
        ),
        callbacks=[recorder],
        epochs=prepared.epochs,
        lengths=prepared.lengths,
        loss=recipe.loss,
        teacher=teacher,
    )


def _save_adapter(
    trainer: SupervisedTrainer, recipe: Recipe, prepared: Prepared, run: RunDir, scores: dict[str, Any]
) -> None:
    trainer.model.peft_config["default"].base_model_name_or_path = prepared.location.public_name
    trainer.model.save_pretrained(run.adapter, save_embedding_layers=False)
    if not prepared.tokenizer.chat_template:
        prepared.tokenizer.chat_template = prepared.renderer.template
    prepared.tokenizer.save_pretrained(run.adapter)
    (run.adapter / "README.md").write_text(
        adapter_card(recipe, base=prepared.location.public_name, scores=scores, rows=prepared.train.rows), "utf-8"
    )
    for path in run.adapter.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which a server under another user could not read


@contextmanager
def stopping_on_signals(recorder: RunRecorder) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM end training after the current step with a checkpoint, the second at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if recorder.stop_requested:
            raise KeyboardInterrupt
        recorder.stop_requested = True
        recorder.reporter.note("stopping after this step with a checkpoint; once more stops at once")

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
