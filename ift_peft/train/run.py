"""One run, from a recipe to a run folder: read, render, measure the base, train, measure the adapter, write it down."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ift_peft.durable import sync_tree
from ift_peft.errors import RunError, TrainingError
from ift_peft.evaluate.forgetting import general_texts
from ift_peft.evaluate.run import Measuring
from ift_peft.evaluate.safety import safety_prompts
from ift_peft.model.base import choose_device, choose_dtype
from ift_peft.model.memory import TRAINED_BYTES, Meter
from ift_peft.model.quiet import quiet
from ift_peft.recipe import Recipe, require_one_task
from ift_peft.report.card import adapter_card
from ift_peft.report.write import NAME as REPORT
from ift_peft.report.write import write_report
from ift_peft.reporter import Reporter
from ift_peft.run_dir import METRICS, RunDir, create_run, settings
from ift_peft.run_ending import ending
from ift_peft.train.arguments import arguments_of, checkpoints_kept
from ift_peft.train.checkpoints import errors_of_writing, newest_verified
from ift_peft.train.inputs import inputs_of, record_inputs
from ift_peft.train.memory import foresee_memory
from ift_peft.train.opening import open_session
from ift_peft.train.out_of_memory import memory_for
from ift_peft.train.prepare import Prepared, prepare
from ift_peft.train.resuming import changed_settings, take_up
from ift_peft.train.room import bytes_in, require_room, room_needed
from ift_peft.train.session import Interrupted, Session, resume_command
from ift_peft.train.signals import ending_on_signals

_LESS_MEASURED = "lower evaluation.per_device_eval_batch_size, or evaluation.max_new_tokens where answers are generated"


def train(
    recipe: Recipe,
    *,
    root: Path,
    reporter: Reporter,
    prepared: Prepared | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    step_timeout: float | None = None,
) -> RunDir:
    """Run `recipe` and return its folder below `root`; `prepared` is what `prepare` made of it, where it was called.

    `callbacks` are called by the trainer, after our own. Where nothing is heard of training for `step_timeout` seconds,
    the process is ended (`Watchdog`).

    Raises `RecipeError`, `DataError` or `ModelError` before a run folder exists, `TrainingError` for a run that could
    not finish, and `Interrupted` after a signal.
    """
    require_one_task(recipe, by="one training")
    prepared = prepared or prepare(recipe, reporter)
    device = choose_device(recipe.base.device)
    dtype = choose_dtype(recipe.base.compute_dtype, device)
    arguments_of(recipe, output_dir=root, device=device, compute_dtype=dtype, max_length=prepared.max_length)
    general_texts(recipe.evaluation)  # read again when they are measured; what is wrong with them is told now
    safety_prompts(recipe.evaluation)
    given = inputs_of(recipe, prepared)
    foreseen = _foresee(recipe, prepared, root, reporter)
    run = create_run(recipe, root)
    opened = partial(open_session, callbacks=callbacks, step_timeout=step_timeout)
    with run.locked():
        with _at_work(run):
            record_inputs(run, prepared, given)
            run.update_manifest(**foreseen)
            _train_and_measure(opened(recipe, prepared, run, reporter), None)
        write_report(run)
    return run


def finish(
    recipe: Recipe,
    *,
    trained: RunDir,
    entries: dict[str, Any],
    root: Path,
    created: Callable[[RunDir], None],
    reporter: Reporter,
) -> RunDir:
    """A whole run of an adapter that was trained in the folder `trained`: base and adapter measured, and saved.

    Its training has ended in its newest checkpoint, and is not gone on with. `entries` go into the manifest. `created`
    is called with the new folder at once; when it is set up, the manifest has `training_ended`.
    """
    prepared = prepare(recipe, reporter)
    checkpoint, _ = newest_verified(trained.checkpoints)
    if checkpoint is None:
        raise RunError(expected="a checkpoint", found=f"none in {trained.checkpoints}", fix="train again")
    foreseen = _foresee(recipe, prepared, root, reporter)
    run = create_run(recipe, root)
    created(run)
    with run.locked():
        with _at_work(run):
            record_inputs(run, prepared, inputs_of(recipe, prepared))
            shutil.copytree(trained.checkpoints, run.checkpoints, symlinks=True)
            shutil.copy(trained.path / METRICS, run.path)
            run.update_manifest(**entries, **foreseen, training_ended=True)
            kept = run.checkpoints / checkpoint.name
            _train_and_measure(open_session(recipe, prepared, run, reporter, resumed=kept), kept)
        write_report(run)
    return run


def resume(
    run: RunDir,
    *,
    reporter: Reporter,
    callbacks: Sequence[TrainerCallback] = (),
    step_timeout: float | None = None,
) -> RunDir:
    """Go on with an unfinished run from its newest checkpoint that verifies, or from its start if none does.

    What was passed over, and what is no longer as when the checkpoint was written, is told and kept in the manifest.
    A run that succeeded and was killed before its report was written gets it.
    Raises `RunError` for a run that succeeded, and where rows, base, template or teacher are no longer those it began
    with; `RunIsBusy` where another process is at it.
    """
    with run.locked():
        if run.status == "succeeded" and not (run.path / REPORT).is_file():
            reporter.note("the run has succeeded; it lacked nothing but its report")
            write_report(run)
            return run
        recipe, prepared = _as_it_began(run, reporter)
        found = take_up(run, device=choose_device(recipe.base.device))
        foreseen = _foresee(recipe, prepared, run.path, reporter, there=bytes_in(run.checkpoints))
        manifest = run.read("manifest.json")
        if found.checkpoint is None and manifest.get("training_ended"):
            raise RunError(
                expected=f"the checkpoint in which training ended, in {run.checkpoints}",
                found="; ".join(found.passed_over) or "none",
                fix="search again: ift tune --fresh",
            )
        for note in found.notes:
            reporter.note(note)
        reporter.note(
            f"resuming from {found.checkpoint.name}"
            if found.checkpoint
            else "no checkpoint to resume from; starting from the first step"
        )
        resumed = [*manifest.get("resumed", []), found.to_json()]
        run.update_manifest(status="running", error=None, resumed=resumed, **foreseen)
        with _at_work(run):
            session = open_session(
                recipe,
                prepared,
                run,
                reporter,
                callbacks=callbacks,
                resumed=found.checkpoint,
                step_timeout=step_timeout,
            )
            _train_and_measure(session, found.checkpoint)
        write_report(run)
    return run


def _as_it_began(run: RunDir, reporter: Reporter) -> tuple[Recipe, Prepared]:
    """Recipe and inputs of a run. Raises `RunError` where it succeeded, and for inputs it did not begin with."""
    if run.status == "succeeded":
        raise RunError(expected="an unfinished run", found=f"{run.path} has succeeded", fix="train again: ift train")
    recipe = run.recipe()
    edited = changed_settings(run.read("manifest.json").get("settings"), settings(recipe))
    if edited:
        raise RunError(
            expected="the recipe that the run began with",
            found=f"another in {run.path / 'recipe.yaml'}: {'; '.join(edited)}",
            fix="restore it, or train it as a run of its own: ift train",
        )
    prepared = prepare(recipe, reporter)
    recorded, now = run.read("manifest.json").get("inputs"), inputs_of(recipe, prepared)
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
    return recipe, prepared


@contextmanager
def _at_work(run: RunDir) -> Iterator[None]:
    """Record how it ends, also by a signal. Raises `Interrupted` after one, with the command that goes on."""
    try:
        with ending(run), quiet(), ending_on_signals():
            yield
    except KeyboardInterrupt:
        raise Interrupted(
            expected="a run that ends by itself", found="it was interrupted", fix=f"go on with: {resume_command(run)}"
        ) from None


def _foresee(
    recipe: Recipe, prepared: Prepared, folder: Path, reporter: Reporter, *, there: int | None = None
) -> dict[str, Any]:
    """The entries `memory` and `disk` of the manifest. Raises `DiskFull` where `folder` has no room for the run.

    `there` are the bytes of the checkpoints that lie in `folder`, of a run that is gone on with.
    """
    with memory_for("the adapter", fix="lower adapter.r"):
        memory = foresee_memory(recipe, prepared, reporter)
    if not memory:
        reporter.note("nor was the room on disk")
        return {"memory": memory}
    arguments = recipe.training
    validated = recipe.validation is not None
    keep = arguments.get("save_total_limit", checkpoints_kept(validated)) or None
    needed = room_needed(
        memory["foreseen"]["adapter"] // TRAINED_BYTES,
        prepared.location,
        optim=str(arguments.get("optim", "adamw_torch")).lower(),
        keep=keep and max(keep, 2 if validated else 1),  # the newest and the best stay, whatever the limit
        saves=str(arguments.get("save_strategy", "epoch")) != "no",
        embeddings=bool(recipe.adapter.embeddings),
    )
    return {"memory": memory, "disk": require_room(needed, folder, reporter, all_kept=keep is None, there=there)}


def _train_and_measure(session: Session, checkpoint: Path | None) -> None:
    recipe, prepared, run, reporter = session.recipe, session.prepared, session.run, session.reporter
    measuring = Measuring(session.model, prepared.renderer, recipe, prepared.test.rows, prepared.probes, reporter)
    with memory_for("measuring the base", fix=_LESS_MEASURED):
        before = measuring.of(adapter=False)
    meter = Meter(session.base.device)
    if checkpoint is not None and run.read("manifest.json").get("training_ended"):
        session.take(checkpoint)
    else:
        session.fit(checkpoint)
        session.stop_before_measuring()
        _require_the_last_step(session)
    memory = run.read("manifest.json").get("memory", {}) | meter.read()
    with memory_for("measuring the adapter", fix=_LESS_MEASURED):
        scores = measuring.scores(before, measuring.of(adapter=True), run=run)
    run.write("scores.json", scores)
    _save_adapter(session, scores)
    trained, every = session.parameters
    progress, speed = session.trainer.progress, session.recorder.tokens_per_second
    run.update_manifest(
        notes=session.notes,
        parameters={"trained": trained, "all": every},
        memory=memory,
        padding_share=round(1 - progress.tokens_seen / max(1, progress.padded_tokens_seen), 4),
        order_sha256=progress.order,
        # Nothing is trained when a run resumes after its last step.
        **({"tokens_per_second": round(speed, 1)} if speed else {}),
        **session.outcome(),
    )


def _require_the_last_step(session: Session) -> None:
    state = session.trainer.state
    if state.global_step < state.max_steps and not session.stopped_early:
        raise TrainingError(
            expected=f"{state.max_steps} steps", found=f"training ended after {state.global_step}", fix="train again"
        )


def _save_adapter(session: Session, scores: dict[str, Any]) -> None:
    recipe, prepared, run = session.recipe, session.prepared, session.run
    config = session.model.peft_config["default"]
    config.base_model_name_or_path = prepared.location.public_name
    if isinstance(config.target_modules, set):  # whose order differs from process to process, and with it the file
        config.target_modules = sorted(config.target_modules)
    if not prepared.tokenizer.chat_template and prepared.renderer.template:
        prepared.tokenizer.chat_template = prepared.renderer.template
    card = adapter_card(recipe, base=prepared.location.public_name, scores=scores, rows=prepared.train.rows)
    with errors_of_writing(run.adapter):
        session.model.save_pretrained(run.adapter, save_embedding_layers=False)
        prepared.tokenizer.save_pretrained(run.adapter)
        (run.adapter / "README.md").write_text(card, "utf-8")
        for path in run.adapter.iterdir():
            path.chmod(0o644)  # safetensors writes 0600, which a server under another user could not read
        sync_tree(run.adapter)
    run.update_manifest(adapter_sha256=run.adapter_hashes())
