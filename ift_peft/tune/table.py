"""What a study found: the content of study.json."""

from __future__ import annotations

import os
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ift_peft.environment import git_state, versions
from ift_peft.recipe import Recipe
from ift_peft.run_dir import RunDir
from ift_peft.tune.budget import Budget

LEAST_FOR_IMPORTANCE = 8  # finished trials; fewer say nothing of what mattered


def best_of(study: optuna.Study) -> FrozenTrial | None:
    """The finished trial with the best validation score, the earlier of equals; None where there is none."""
    found = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
    return min(found, key=lambda trial: (sign * (trial.value or 0.0), trial.number), default=None)


def finished(study: optuna.Study) -> int:
    """How many trials are over, without those whose settings had been tried before."""
    return sum(
        trial.state.is_finished() and "same_as" not in trial.user_attrs for trial in study.get_trials(deepcopy=False)
    )


def result(
    study: optuna.Study, recipe: Recipe, metric: str, budget: Budget, folder: RunDir, run: RunDir | None
) -> dict[str, Any]:
    """The content of study.json; `run` is the best trial as a run, when that has been measured."""
    best, trials = best_of(study), study.get_trials(deepcopy=False)
    content: dict[str, Any] = {
        "recipe": recipe.name,
        "metric": metric,
        "target": recipe.evaluation.target,
        "limits": budget.limits,
        "spent": {
            "trials": finished(study),
            "minutes": round(budget.seconds / 60, 2),
            "tokens": budget.tokens,
        },
        "ended_by": study.user_attrs.get("ended_by"),
        "trials": [_line(trial, metric) for trial in trials],
        "best": None if best is None else best.number,
        "importances": _importances(study),
        "versions": {**versions(), "optuna": optuna.__version__},
        "git": git_state(),
    }
    return content if run is None else {**content, "run": os.path.relpath(run.path, folder.path)}


def _line(trial: FrozenTrial, metric: str) -> dict[str, Any]:
    attributes = trial.user_attrs
    names = ("continued_from", "same_as", "measurements", "steps", "best_step", "stopped_early", "improving")
    line = {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "settings": attributes.get("settings", {}),
        "score": attributes.get("scores", {}).get(metric),
        "stopped_by": (attributes.get("ended") or {}).get("why"),
        **{name: attributes.get(name) for name in names},
        **attributes.get("spent", {}),
        "error": attributes.get("error"),
    }
    return {name: value for name, value in line.items() if value is not None}


def _importances(study: optuna.Study) -> dict[str, float] | None:
    """The share of each setting in how far the scores differ (PED-ANOVA, arXiv:2304.10255)."""
    found = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    drawn = [trial for trial in found if trial.params]
    if len(drawn) < LEAST_FOR_IMPORTANCE or len({trial.value for trial in drawn}) < 2:
        return None
    return {name: round(share, 3) for name, share in optuna.importance.get_param_importances(study).items()}
