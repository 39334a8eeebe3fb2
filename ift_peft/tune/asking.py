"""Which trial comes next: the recipe's own settings, settings that are drawn, or the best trial continued."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from ift_peft.selection import Tune
from ift_peft.tune.budget import Budget
from ift_peft.tune.search import Settings, suggested, within
from ift_peft.tune.table import best_of, finished

STARTUP = 4  # trials before the sampler learns from them, and before the median of them prunes others
OVER = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def open_study(folder: Path, *, minimize: bool) -> optuna.Study:
    """The study of a folder that this process holds, from its journal; mended where it was killed while writing."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = folder / "journal.log"
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if journal.is_file():
        content = journal.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with journal.open("r+b") as file:
                file.truncate(whole)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        study_name="tune",
        direction="minimize" if minimize else "maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
        load_if_exists=True,
    )


@dataclass(frozen=True)
class Asker:
    """Asks a study for trials. `own` are the recipe's own settings, `space` is what is searched.

    A trial knows its `settings` and, where it continues another, that one's number as `continued_from`.
    """

    study: optuna.Study
    section: Tune
    space: Mapping[str, BaseDistribution]
    own: Settings
    budget: Budget
    note: Callable[[str], None]

    def running(self) -> Trial | None:
        """The trial that an earlier session was at when it ended, complete with its settings."""
        found = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if not found:
            return None
        trial = Trial(self.study, found[0]._trial_id)
        self._settle(trial)
        return trial

    def next(self) -> Trial:
        """A new trial."""
        number = len(self.study.get_trials(deepcopy=False, states=(*OVER, TrialState.RUNNING)))
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not number and not waiting and within(self.own, self.space):
            self.study.enqueue_trial(self.own)
        trial = self.study.ask()
        self._settle(trial)
        return trial

    def same_as(self, trial: Trial) -> FrozenTrial | None:
        """A finished trial of the same settings, whose training this one would repeat."""
        if "continued_from" in trial.user_attrs:
            return None
        for other in self.study.get_trials(deepcopy=False, states=OVER):
            attributes = other.user_attrs
            if attributes.get("settings") == trial.user_attrs["settings"] and "continued_from" not in attributes:
                return other
        return None

    def ancestors(self, trial: Trial | FrozenTrial) -> list[int]:
        """The numbers of the trials that it continues, the latest first."""
        found: list[int] = []
        previous = trial.user_attrs.get("continued_from")
        while previous is not None:
            found.append(previous)
            previous = self.study.trials[previous].user_attrs.get("continued_from")
        return found

    def _settle(self, trial: Trial) -> None:
        """Give the trial its settings, unless it has them.

        They are written last, all at once: wherever this is killed, the same follows from what was written before.
        """
        if "settings" in trial.user_attrs:
            return
        previous = trial.user_attrs.get("continued_from")
        if previous is None and self.section.continue_best and not trial.params:  # nothing was drawn for it
            best = self._to_continue()
            if best is not None:
                previous = best.number
                trial.set_user_attr("continued_from", previous)
        if previous is not None:
            trial.set_user_attr("settings", self.study.trials[previous].user_attrs["settings"])
            return
        own = trial.number == 0 and not within(self.own, self.space)
        if own:
            self.note("the recipe's own settings are not all among those searched; trial 0 takes them all the same")
        trial.set_user_attr("settings", self.own if own else self._drawn(trial))

    def _drawn(self, trial: Trial) -> Settings:
        """What is drawn depends on the study's seed, the trial's number and the trials before it alone."""
        self.study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=STARTUP, seed=self.section.seed * 1_000_003 + trial.number
        )
        values: Settings = {}
        for path, one in self.space.items():
            if path in trial.params:  # from before a kill: drawn again for the generator to be where it was
                frozen = self.study.trials[trial.number]
                self.study.sampler.sample_independent(self.study, frozen, path, one)
            values[path] = suggested(trial, path, one)
        return values

    def _to_continue(self) -> FrozenTrial | None:
        """The best trial, where its last measurement was its best, half of a limit is spent, and none continues it."""
        best = best_of(self.study)
        if best is None or not best.user_attrs.get("improving") or not self.budget.half_spent(finished(self.study)):
            return None
        before = {trial.user_attrs.get("continued_from") for trial in self.study.get_trials(deepcopy=False)}
        return None if best.number in before else best
