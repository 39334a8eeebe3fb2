"""Running trials: each is trained in a folder of its own, measured on validation rows alone, and may go on there."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from optuna.trial import FrozenTrial, Trial, TrialState

from ift_peft.errors import IftPeftError, RecipeError, RunError, TrainingError, first_line
from ift_peft.recipe import Recipe, dump_recipe
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir, write_atomically
from ift_peft.train.checkpoints import newest_complete
from ift_peft.train.prepare import Prepared, prepare
from ift_peft.train.run import forget_steps_after
from ift_peft.train.session import Interrupted, Session, open_session
from ift_peft.tune.asking import OVER, Asker
from ift_peft.tune.search import Settings, with_settings
from ift_peft.tune.table import best_of
from ift_peft.tune.watch import TrialWatcher

# What `prepare` takes of the section `training`.
PREPARED_FROM = (
    "max_length",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


@dataclass
class _TrialReporter:
    """Stages, and notes once it trains, under the trial's number; earlier notes are told once in all."""

    reporter: Reporter
    number: int
    told: set[str]
    training: bool = False

    def note(self, text: str) -> None:
        if self.training:
            self.reporter.note(f"trial {self.number}: {text}")
        elif text not in self.told:
            self.told.add(text)
            self.reporter.note(text)

    def stage(self, text: str, total: int) -> None:
        self.training = self.training or text == "training"
        self.reporter.stage(f"trial {self.number}: {text}", total)

    def advance(self, done: int, detail: str = "") -> None:
        self.reporter.advance(done, detail)

    def finish(self) -> None:
        self.reporter.finish()


class Trials:
    """Trains the trials of a study, below its folder."""

    def __init__(self, recipe: Recipe, asker: Asker, *, folder: RunDir, reporter: Reporter) -> None:
        self.recipe, self.asker, self.folder, self.reporter = recipe, asker, folder, reporter
        self.study, self.budget, self.section = asker.study, asker.budget, asker.section
        self._told: set[str] = set()
        self._last: tuple[str, Prepared] | None = None

    def run(self, trial: Trial) -> None:
        """Train a trial, from its newest checkpoint where it has one, and tell the study how it ended.

        A trial that cannot be trained has failed, and the search goes on. Raises what is wrong with the recipe's own
        settings, `Interrupted` after a signal, and `RunError`.
        """
        settings, previous = trial.user_attrs["settings"], trial.user_attrs.get("continued_from")
        kind = "" if previous is None else f" (trial {previous} continued)"
        self.reporter.note(f"trial {trial.number}: {shown(settings)}{kind}")
        seconds, tokens = self.budget.seconds, self.budget.tokens
        try:
            session, watcher = self._train(trial)
        except (Interrupted, KeyboardInterrupt):
            self._add_spent(trial, seconds, tokens)
            raise
        except RunError:
            raise
        except (IftPeftError, torch.OutOfMemoryError) as error:
            if trial.number == 0 and not isinstance(error, TrainingError | torch.OutOfMemoryError):
                raise
            self.reporter.note(f"trial {trial.number} failed: {first_line(error)}")
            trial.set_user_attr("error", str(error)[:2000])
            self._add_spent(trial, seconds, tokens)
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            outcome = session.outcome()
            trial.set_user_attr("best_step", outcome["best"]["step"])
            trial.set_user_attr("steps", outcome["steps"])
            trial.set_user_attr("stopped_early", outcome["stopped_early"])
            self._add_spent(trial, seconds, tokens)
            if watcher.ended == "pruned":
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                value = session.trainer.state.best_metric
                assert value is not None  # the outcome has a best checkpoint
                self.study.tell(trial, float(value))
        self._free()

    def repeat(self, trial: Trial, other: FrozenTrial) -> None:
        """End a trial that would only repeat another. It counts for no limit."""
        self.reporter.note(f"trial {trial.number}: the settings of trial {other.number} again; not trained again")
        trial.set_user_attr("same_as", other.number)
        self.study.tell(trial, state=TrialState.FAIL)

    def _train(self, trial: Trial) -> tuple[Session, TrialWatcher]:
        run, recipe, previous = self.folder_of(trial.number), self.recipe_of(trial), self.asker.ancestors(trial)[:1]
        prepared = self.prepared(recipe, trial.number)
        checkpoint, skipped = newest_complete(run.checkpoints)
        for line in skipped:
            self.reporter.note(f"trial {trial.number}: {line}")
        if checkpoint is not None:
            self.reporter.note(f"trial {trial.number} goes on from {checkpoint.name}")
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        forget_steps_after(run, step)
        write_atomically(run.path / "recipe.yaml", dump_recipe(recipe))
        watcher = TrialWatcher(
            trial,
            self.budget,
            prune=self.section.prune and not previous,
            offset=sum(int(self.study.trials[number].user_attrs["measurements"]) for number in previous),
            note=self.reporter.note,
        )
        session = open_session(
            recipe,
            prepared,
            run,
            _TrialReporter(self.reporter, trial.number, self._told),
            callbacks=[watcher],
            start_from=self._best_checkpoint(previous[0]) if previous else None,
            resumed=checkpoint,
            go_on="the same command",
        )
        watcher.session = session
        ended = trial.user_attrs.get("ended")
        if checkpoint is not None and ended is not None and step >= ended["step"]:
            watcher.ended = ended["why"]
            session.take(checkpoint)
        else:
            session.fit(checkpoint)
        return session, watcher

    def recipe_of(self, trial: Trial | FrozenTrial) -> Recipe:
        """What a trial trains. One that continues another has a seed further on, to see the rows in another order."""
        own = self.asker.own
        settings = {path: value for path, value in trial.user_attrs["settings"].items() if value != own[path]}
        return with_settings(self.recipe, settings).with_seed(len(self.asker.ancestors(trial)))

    def prepared(self, recipe: Recipe, number: int) -> Prepared:
        """Rows and renderings, those of the trial before where nothing that they are made of differs.

        Raises `RecipeError` where a trial's settings change which rows are validated on.
        """
        values = recipe.model_dump(mode="json")
        values["training"] = {name: values["training"].get(name) for name in PREPARED_FROM}
        values["adapter"] = values["adapter"]["target_modules"]
        key = json.dumps(values, sort_keys=True)
        if self._last is None or self._last[0] != key:
            self._last = key, prepare(recipe, _TrialReporter(self.reporter, number, self._told))
        prepared = self._last[1]
        assert prepared.validation is not None
        places = sorted([row.where, row.answer] for row in prepared.validation.rows)
        found = hashlib.sha256(json.dumps(places).encode()).hexdigest()
        before = self.study.user_attrs.get("validation_rows")
        if before is None:
            self.study.set_user_attr("validation_rows", found)
        elif before != found:
            raise RecipeError(
                expected="tune.search over settings that leave the validation rows as they are",
                found=f"others in trial {number}",
                fix="search no settings of data that add or remove rows",
            )
        return prepared

    def folder_of(self, number: int) -> RunDir:
        run = RunDir(self.folder.path / "trials" / f"{number:03d}")
        run.path.mkdir(parents=True, exist_ok=True)
        return run

    def _best_checkpoint(self, number: int) -> Path:
        return self.folder_of(number).checkpoints / f"checkpoint-{self.study.trials[number].user_attrs['best_step']}"

    def _add_spent(self, trial: Trial, seconds: float, tokens: int) -> None:
        before = trial.user_attrs.get("spent", {"seconds": 0.0, "tokens": 0})
        spent = {"seconds": self.budget.seconds - seconds, "tokens": self.budget.tokens - tokens}
        trial.set_user_attr("spent", {name: round(before[name] + spent[name], 1) for name in before})
        self.budget.write()

    def _free(self) -> None:
        """Keep the checkpoints of the best trial alone: no other is measured or continued any more."""
        best = best_of(self.study)
        for trial in self.study.get_trials(deepcopy=False, states=OVER):
            checkpoints = self.folder.path / "trials" / f"{trial.number:03d}" / "checkpoints"
            if best is None or trial.number != best.number:
                shutil.rmtree(checkpoints, ignore_errors=True)
        gc.collect()


def shown(settings: Settings) -> str:
    """Settings on a line, numbers to four digits."""
    return ", ".join(
        f"{path}={value:.4g}" if isinstance(value, float) else f"{path}={value}" for path, value in settings.items()
    )
