"""Running trials: each is trained in a folder of its own, measured on validation rows alone, and may go on there."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import torch
from optuna.trial import FrozenTrial, Trial, TrialState

from ift_peft.durable import write_atomically
from ift_peft.errors import DiskFull, Diverged, IftPeftError, RunError, TrainingError, first_line
from ift_peft.model.base import choose_device
from ift_peft.recipe import Recipe, dump_recipe
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir
from ift_peft.train.opening import open_session
from ift_peft.train.resuming import take_up
from ift_peft.train.session import Interrupted, Session
from ift_peft.tune.asking import OVER, Asker
from ift_peft.tune.rows import TrialRows
from ift_peft.tune.search import Settings, with_settings
from ift_peft.tune.table import best_of
from ift_peft.tune.watch import TrialWatcher


class Trials:
    """Trains the trials of a study, below its folder."""

    def __init__(self, recipe: Recipe, asker: Asker, *, rows: TrialRows, folder: RunDir, reporter: Reporter) -> None:
        self.recipe, self.asker, self.rows, self.folder, self.reporter = recipe, asker, rows, folder, reporter
        self.study, self.budget, self.section = asker.study, asker.budget, asker.section

    def run(self, trial: Trial) -> None:
        """Train a trial, from its newest checkpoint where it has one, and tell the study how it ended.

        A trial that cannot be trained has failed, and the search goes on. Raises what is wrong with the recipe's own
        settings, `RunError`, `DiskFull`, and `Interrupted` after a signal; where that came too late to stop it, the
        trial is over.
        """
        settings, previous = trial.user_attrs["settings"], trial.user_attrs.get("continued_from")
        kind = "" if previous is None else f" (trial {previous} continued)"
        self.reporter.note(f"trial {trial.number}: {shown(settings)}{kind}")
        if "began" not in trial.user_attrs:
            self.budget.write()  # so that a kill cannot take the study back to before this
            trial.set_user_attr("began", {"seconds": self.budget.seconds, "tokens": self.budget.tokens})
        stopped = False
        try:
            stopped = self._train_and_tell(trial)
        except (Interrupted, RunError, DiskFull):
            raise
        except (IftPeftError, torch.OutOfMemoryError) as error:
            if trial.number == 0 and not isinstance(error, TrainingError | torch.OutOfMemoryError):
                raise
            self.reporter.note(f"trial {trial.number} failed: {first_line(error)}")
            trial.set_user_attr("error", str(error)[:2000])
            self._write_spent(trial)
            # The search learns from what was measured before a loss was lost, but from no failure.
            learnt = isinstance(error, Diverged) and self.study.trials[trial.number].intermediate_values
            self.study.tell(trial, state=TrialState.PRUNED if learnt else TrialState.FAIL)
        finally:
            self._free()
        if stopped:
            raise Interrupted(
                expected="a search that ends by itself",
                found=f"a signal at the end of trial {trial.number}, which is over",
                fix="go on with: the same command",
            )

    def _train_and_tell(self, trial: Trial) -> bool:
        """Train a trial and tell the study how it ended. Whether a signal came that its end left no time to act on."""
        session, watcher = self._train(trial)
        outcome = session.outcome()
        trial.set_user_attr("best_step", outcome["best"]["step"])
        trial.set_user_attr("steps", outcome["steps"])
        trial.set_user_attr("stopped_early", outcome["stopped_early"])
        self._write_spent(trial)
        if watcher.ended == "pruned":
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            value = session.trainer.state.best_metric
            assert value is not None  # the outcome has a best checkpoint
            self.study.tell(trial, float(value))
        return session.recorder.stop_requested

    def repeat(self, trial: Trial, other: FrozenTrial) -> None:
        """End a trial that would only repeat another. It counts for no limit."""
        self.reporter.note(f"trial {trial.number}: the settings of trial {other.number} again; not trained again")
        trial.set_user_attr("same_as", other.number)
        self.study.tell(trial, state=TrialState.FAIL)

    def _train(self, trial: Trial) -> tuple[Session, TrialWatcher]:
        run, recipe, previous = self.folder_of(trial.number), self.recipe_of(trial), self.asker.ancestors(trial)[:1]
        prepared = self.rows.prepared(recipe, trial.number)
        found = take_up(run, device=choose_device(recipe.base.device))
        for line in found.notes:
            self.reporter.note(f"trial {trial.number}: {line}")
        checkpoint, step = found.checkpoint, found.step
        if checkpoint is not None:
            self.reporter.note(f"trial {trial.number} goes on from {checkpoint.name}")
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
            self.rows.reporter(trial.number),
            callbacks=[watcher],
            start_from=self._best_checkpoint(previous[0]) if previous else None,
            resumed=checkpoint,
            go_on="the same command",
        )
        watcher.session = session
        ended = trial.user_attrs.get("ended")
        if checkpoint is not None and ended is not None and step == ended["step"]:
            watcher.ended = ended["why"]
            session.take(checkpoint)
        else:
            if ended is not None:  # killed before that step's checkpoint was written
                trial.set_user_attr("ended", None)
            session.fit(checkpoint)
        return session, watcher

    def recipe_of(self, trial: Trial | FrozenTrial) -> Recipe:
        """What a trial trains: the recipe as it stands, or with every setting that was drawn, defaults or not.

        One that continues another has a seed further on, to see the rows in another order.
        """
        settings = trial.user_attrs["settings"]
        settings = {} if settings == self.asker.own else settings
        return with_settings(self.recipe, settings).with_seed(len(self.asker.ancestors(trial)))

    def folder_of(self, number: int) -> RunDir:
        run = RunDir(self.folder.path / "trials" / f"{number:03d}")
        run.path.mkdir(parents=True, exist_ok=True)
        return run

    def _best_checkpoint(self, number: int) -> Path:
        return self.folder_of(number).checkpoints / f"checkpoint-{self.study.trials[number].user_attrs['best_step']}"

    def _write_spent(self, trial: Trial) -> None:
        """What the study has spent since the trial began, over all sessions: nothing else was trained meanwhile."""
        began = trial.user_attrs["began"]
        now = {"seconds": self.budget.seconds, "tokens": self.budget.tokens}
        trial.set_user_attr("spent", {name: round(now[name] - began[name], 1) for name in now})
        self.budget.write()

    def _free(self) -> None:
        """Let go of the model that was trained, before the next is loaded, and of checkpoints but the best trial's.

        No other trial is measured or continued any more. Nothing may hold the session here: it lies in cycles.
        """
        best = best_of(self.study)
        for trial in self.study.get_trials(deepcopy=False, states=OVER):
            checkpoints = self.folder.path / "trials" / f"{trial.number:03d}" / "checkpoints"
            if best is None or trial.number != best.number:
                shutil.rmtree(checkpoints, ignore_errors=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def shown(settings: Settings) -> str:
    """Settings on a line, numbers to four digits."""
    return ", ".join(
        f"{path}={value:.4g}" if isinstance(value, float) else f"{path}={value}" for path, value in settings.items()
    )
