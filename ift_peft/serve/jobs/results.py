"""What a job leaves when it has succeeded: its model, its file of metrics, and its scores."""

from __future__ import annotations

import csv
import hashlib
import io
from typing import Any

from sqlalchemy import Connection, null, select, update

from ift_peft.durable import write_atomically
from ift_peft.run_dir import RunDir
from ift_peft.serve.jobs.folder import JobFolder, newest_run
from ift_peft.serve.jobs.progress import Progress, shown
from ift_peft.serve.jobs.records import change, derived_id, now, tell
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Store
from ift_peft.serve.store.tables import files, models
from ift_peft.train.checkpoints import MANIFEST, PROGRESS, tidy

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
# The manifest goes first: without it, nothing takes what is left for a checkpoint to go on from.
ONLY_TO_RESUME = (MANIFEST, PROGRESS, "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
SHOWN_SCORES = ("rows", "base", "adapter", "change", "intervals", "forgetting", "safety", "gates")


def succeed(settings: Settings, store: Store, progress: Progress) -> bool:
    """End the job as succeeded, once; False where it has ended or was paused in the meantime.

    The model and the file of metrics are there in the moment in which the job has succeeded.
    """
    run = newest_run(settings.runs, progress.job)
    assert run is not None and run.status == "succeeded"
    manifest, scores, metrics = run.read("manifest.json"), run.read("scores.json"), run.read_metrics()[0]
    progress.ended(int(manifest["steps"]))
    result = derived_id("file", progress.job, "step_metrics")
    content = step_metrics(metrics)
    write_atomically(settings.files / result, content)
    (settings.files / result).chmod(0o600)
    epochs = max((float(line.get("epoch", 0)) for line in metrics), default=0.0)
    with store.begin() as connection:
        ended = change(
            connection,
            progress.job,
            to="succeeded",
            attempt=progress.attempt,
            fine_tuned_model=progress.name,
            result_files=[result],
            trained_tokens=round(manifest["rows"]["train"]["tokens"] / manifest["rows"]["train"]["variants"] * epochs),
            run=str(run.path.relative_to(settings.data_dir)),
        )
        if not ended:
            if connection.execute(select(files.c.id).where(files.c.id == result)).first() is None:
                (settings.files / result).unlink()
            return False
        _enter(connection, settings, progress, run, result=result, content=content)
        kept = int(manifest.get("best", {}).get("step", manifest["steps"]))
        _complete_checkpoint(connection, progress.job, kept, scores)
        _tell_scores(connection, progress.job, scores)
        tell(connection, progress.job, f"New fine-tuned model created: {progress.name}")
        tell(connection, progress.job, "The job has successfully completed")
    slim(run)
    return True


def _enter(
    connection: Connection, settings: Settings, progress: Progress, run: RunDir, *, result: str, content: str
) -> None:
    """The file of metrics, called `result`, and the model, as records."""
    connection.execute(
        files.insert().values(
            id=result,
            created_at=now(),
            filename="step_metrics.csv",
            purpose="fine-tune-results",
            bytes=len(content.encode()),
            rows=content.count("\n") - 1,
            sha256=hashlib.sha256(content.encode()).hexdigest(),
        )
    )
    connection.execute(
        models.insert().values(
            id=derived_id("ftmodel", progress.job),
            name=progress.name,
            created_at=now(),
            job=progress.job,
            base=progress.base,
            step=null(),
            metrics=null(),
            run=str(run.path.relative_to(settings.data_dir)),
            adapter=str(run.adapter.relative_to(settings.data_dir)),
        )
    )


def _tell_scores(connection: Connection, job: str, scores: dict[str, Any]) -> None:
    """As events of the job: what was measured, and each target that was missed."""
    told = {name: scores[name] for name in SHOWN_SCORES if name in scores}
    tell(connection, job, _summary(scores), data={"scores": told})
    for gate in scores["gates"]:
        if not gate["met"]:
            missed = f"Target missed: expected {gate['expected']}; found {gate['found']}"
            tell(connection, job, missed, level="warn", data=gate)


def _complete_checkpoint(connection: Connection, job: str, step: int, scores: dict[str, Any]) -> None:
    """The held-out rows are measured once, after training: theirs is the loss of the checkpoint whose weights stay."""
    loss = scores["adapter"].get("loss")
    found = connection.execute(select(models.c.metrics).where(models.c.job == job, models.c.step == step)).scalar()
    if loss is not None and found is not None:
        connection.execute(
            update(models)
            .where(models.c.job == job, models.c.step == step)
            .values(metrics={**found, "full_valid_loss": loss["value"]})
        )


def _summary(scores: dict[str, Any]) -> str:
    """The first score of the adapter beside that of the base."""
    metric = next(iter(scores["adapter"]))
    before, after = (scores[who][metric]["value"] for who in ("base", "adapter"))
    return f"Measured on {scores['rows']} held-out rows: {metric} {before:.3f} before, {after:.3f} after"


def step_metrics(metrics: list[dict[str, Any]]) -> str:
    """The file of metrics by step, with the columns of OpenAI's; a value that was not measured is empty."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in metrics:
        data = shown(line)
        if "train_mean_token_accuracy" in data:
            data["train_accuracy"] = data["train_mean_token_accuracy"]
        by_step.setdefault(data["step"], {}).update(data)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(by_step[step] for step in sorted(by_step))
    return text.getvalue()


def clear_cancelled(settings: Settings, job: str) -> None:
    """Remove what nothing needs of a job that was cancelled; its checkpoints stay models."""
    JobFolder(settings.jobs / job).clear()
    run = newest_run(settings.runs, job)
    if run is not None:
        slim(run)


def slim(run: RunDir) -> None:
    """Remove from the checkpoints of a run that has ended what only going on with it would need."""
    tidy(run.checkpoints)
    for checkpoint in run.checkpoints.glob("checkpoint-*"):
        for name in ONLY_TO_RESUME:
            (checkpoint / name).unlink(missing_ok=True)
