"""What the trainer of a job tells, made into the job's events, checkpoints and times."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, delete, select, update

from ift_peft.run_dir import RunDir
from ift_peft.serve.ids import new_id
from ift_peft.serve.jobs.folder import JobFolder, newest_run
from ift_peft.serve.jobs.records import change, now, tell
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Record, Store, StoreUnavailable
from ift_peft.serve.store.tables import events, jobs, models
from ift_peft.train.checkpoints import MANIFEST, checkpoints_in, step_of

WAIT_MS = 1_000  # for another writer: it is called again soon, and a service that is to stop waits for it
TRAINING = "training"  # the stage of that name
CREATED = "fine_tuned_model_checkpoint"  # of the data of an event


class Progress:
    """Follows one trainer through the files that it writes. `update` is called from time to time, and at its end."""

    def __init__(self, settings: Settings, store: Store, record: Record, folder: JobFolder) -> None:
        self.settings, self.store, self.folder = settings, store, folder
        self.job, self.attempt, self.base = str(record["id"]), int(record["attempt"]), str(record["base"])
        self.name = str(tuned_name(settings, record))
        self.every = ((record["recipe"].get("validation") or {}).get("every")) or "epoch"
        self.hyperparameters = record["resolved"]
        self._offset = 0
        self._stage, self._stage_began = "", 0.0
        self._before = 0.0  # seconds that measuring the base took
        self.steps, self.total = 0, 0
        self._first: tuple[float, int] | None = None  # time and number of the first step seen
        self._trained = False
        self._estimated = 0
        told = store.every(select(events.c.data).where(events.c.job == self.job, events.c.type == "metrics"))
        named = select(events.c.data).where(events.c.job == self.job, events.c.type == "message")
        created = [row["data"][CREATED] for row in store.every(named) if CREATED in (row["data"] or {})]
        self._created = {int(name.rpartition("-")[2]) for name in created}  # steps whose checkpoint was told
        self._saved: list[int] = []  # to be told
        self._told = {
            kind: max((row["data"]["step"] for row in told if kind in row["data"]), default=0) for kind in KINDS
        }

    def update(self) -> None:
        """Read what is new, and write it to the store in one transaction.

        What a store that is away did not take is told at the next call.
        """
        before = {name: copy.copy(value) for name, value in vars(self).items() if name not in ("settings", "store")}
        try:
            self._update()
        except StoreUnavailable:
            vars(self).update(before)
            raise

    def _update(self) -> None:
        lines, self._offset = self.folder.reported(self._offset)
        run = newest_run(self.settings.runs, self.job) if self.total else None
        metrics = run.read_metrics()[0] if run is not None else []
        with self.store.begin(wait_ms=WAIT_MS) as connection:
            for line in lines:
                self._take(connection, line)
            self._tell_metrics(connection, metrics)
            while self._saved:
                self._tell_created(connection, self._saved.pop(0))
            if run is not None:
                self._tell_checkpoints(connection, run, metrics)
            self._estimate(connection)

    def ended(self, steps: int) -> None:
        """Training has ended after `steps` steps, in this attempt or one before: tell all that is left."""
        self.steps = self.total = steps
        self._trained = True
        self.update()

    def _take(self, connection: Connection, line: dict[str, Any]) -> None:
        kind, at = line["kind"], float(line["at"])
        if kind == "note":
            level = "warn" if line["text"].startswith("warning") else "info"
            tell(connection, self.job, line["text"], level=level)
        elif kind == "checked":
            validated = {"checked_at": now(), "hyperparameters": self.hyperparameters}
            if change(connection, self.job, to="queued", attempt=self.attempt, **validated):
                tell(connection, self.job, "Files validated, moving job to queued state")
        elif kind == "begun":
            began = connection.execute(select(jobs.c.started_at).where(jobs.c.id == self.job)).scalar()
            if change(connection, self.job, to="running", attempt=self.attempt, started_at=began or now()):
                tell(connection, self.job, "Fine-tuning job started" if began is None else "Fine-tuning job resumed")
        elif kind == "stage":
            self._stage, self._stage_began = line["text"], at
            if self._stage == TRAINING:
                self.total, self._first = int(line["total"]), None
        elif kind == "finish" and self._stage == TRAINING:
            self._trained = True
        elif kind == "finish" and not self.total and not self._stage.startswith("tokenising"):
            self._before += at - self._stage_began
        elif kind == "saved" and self._is_due(line["step"], line["epoch"], line["of"]):
            self._saved.append(int(line["step"]))
        elif kind == "done" and self._stage == TRAINING:
            self.steps = int(line["done"])
            self._first = self._first or (at, self.steps)

    def _tell_metrics(self, connection: Connection, metrics: list[dict[str, Any]]) -> None:
        """A metrics event for each new line. A resumed run takes the steps after its checkpoint again, as they were."""
        for line in metrics:
            data = shown(line)
            kind = next((kind for kind in KINDS if kind in data), None)
            if kind is None or data["step"] <= self._told[kind]:
                continue
            self._told[kind] = int(data["step"])
            called = "training" if kind == "train_loss" else "validation"
            message = f"Step {data['step']}/{self.total}: {called} loss={data[kind]:.2f}"
            tell(connection, self.job, message, kind="metrics", data={**data, "total_steps": self.total})

    def _tell_checkpoints(self, connection: Connection, run: RunDir, metrics: list[dict[str, Any]]) -> None:
        """A model for each checkpoint that is whole, and none for those that are there no more."""
        known = {
            int(row.step)
            for row in connection.execute(
                select(models.c.step).where(models.c.job == self.job, models.c.step.is_not(None))
            )
        }
        found = {step_of(path): path for path in checkpoints_in(run.checkpoints)}
        gone = known - set(found)
        if gone:
            connection.execute(delete(models).where(models.c.job == self.job, models.c.step.in_(gone)))
        for step in sorted(set(found) - known):
            if (step < self.steps or self._trained) and self._is_listed(found[step]):
                self._add_checkpoint(connection, run, found[step], step, metrics)

    def _is_listed(self, checkpoint: Path) -> bool:
        """Whether a checkpoint, which gets its name when it is whole, is one of the recipe's, not one of a pause."""
        if not (checkpoint / MANIFEST).is_file():
            return False
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
        except FileNotFoundError:  # it makes room for another in this moment
            return False
        return self._is_due(state["global_step"], state["epoch"], state["max_steps"])

    def _is_due(self, step: int, epoch: float, steps: int) -> bool:
        by_step = self.every != "epoch"
        return step >= steps or (step % int(self.every) == 0 if by_step else float(epoch).is_integer())

    def _tell_created(self, connection: Connection, step: int) -> None:
        """Once, also where a resumed run takes the step again; the checkpoint may have made room for others since."""
        if step not in self._created:
            self._created.add(step)
            tell(connection, self.job, f"Checkpoint created at step {step}", data={CREATED: self._checkpoint(step)})

    def _checkpoint(self, step: int) -> str:
        return f"{self.name}:ckpt-step-{step}"

    def _add_checkpoint(
        self, connection: Connection, run: RunDir, checkpoint: Path, step: int, metrics: list[dict[str, Any]]
    ) -> None:
        connection.execute(
            models.insert().values(
                id=new_id("ftckpt"),
                name=self._checkpoint(step),
                created_at=now(),
                job=self.job,
                base=self.base,
                step=step,
                metrics=at_step(metrics, step),
                run=str(run.path.relative_to(self.settings.data_dir)),
                adapter=str(checkpoint.relative_to(self.settings.data_dir)),
            )
        )
        self._tell_created(connection, step)

    def _estimate(self, connection: Connection) -> None:
        """Steps left at the speed of this attempt, and measuring the adapter as long as measuring the base took."""
        if self._first is None or self.steps <= self._first[1] or self._trained:
            return
        began, first = self._first
        current = time.time()
        left = (current - began) / (self.steps - first) * (self.total - self.steps) + self._before
        estimated = round(current + left)
        if abs(estimated - self._estimated) > 1:
            self._estimated = estimated
            connection.execute(
                update(jobs)
                .where(jobs.c.id == self.job, jobs.c.status == "running", jobs.c.attempt == self.attempt)
                .values(estimated_finish=estimated)
            )


KINDS = ("train_loss", "valid_loss")
_NAMES = {
    "loss": "train_loss",
    "mean_token_accuracy": "train_mean_token_accuracy",
    "eval_loss": "valid_loss",
    "learning_rate": "learning_rate",
}


def tuned_name(settings: Settings, record: Record) -> str:
    """`ft:<base>:<organization>:<suffix>:<8 letters>`; the last are those of the job's id, which nobody can guess."""
    return f"ft:{record['base']}:{settings.organization}:{record['suffix'] or ''}:{record['id'][-8:]}"


def shown(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl by OpenAI's names."""
    return {"step": int(line["step"]), **{new: line[old] for old, new in _NAMES.items() if old in line}}


def at_step(metrics: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """The last measured training loss up to `step`, and what was validated at it."""
    found: dict[str, Any] = {"step": step}
    for line in metrics:
        data = shown(line)
        if data["step"] <= step and "train_loss" in data:
            found |= {name: data[name] for name in ("train_loss", "train_mean_token_accuracy") if name in data}
        if data["step"] == step and "valid_loss" in data:
            found["valid_loss"] = data["valid_loss"]
    return found
