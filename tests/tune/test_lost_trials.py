"""Trials that are lost: recorded with why, and the search goes on to the best of the others."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from ift_peft.errors import DiskFull
from ift_peft.reporter import Silent
from tests.tune.test_study import TWO, run_of, search

pytestmark = pytest.mark.slow
RATES = "tune.search={training.learning_rate: [1e38, 1e6, 5e-4, 1e-3]}"


def test_trials_whose_loss_is_lost_are_recorded_and_the_best_of_the_others_is_the_result(tmp_path: Path) -> None:
    found = search(
        tmp_path,
        RATES,
        "training.learning_rate=1e38",  # of the recipe itself, which comes first
        "training.max_steps=12",
        "validation.every=4",
        "tune.trials=4",
        "tune.continue_best=false",
    )
    content = found.read("study.json")
    own = [trial for trial in content["trials"] if "same_as" not in trial]
    trials = {trial["settings"]["training.learning_rate"]: trial for trial in own}
    assert own[0] is trials[1e38]
    not_a_number, guessing = trials[1e38], trials[1e6]
    assert (not_a_number["state"], guessing["state"]) == ("fail", "pruned")
    assert "every one of its 4 rows" in not_a_number["error"]
    assert "guessing among 8,192" in guessing["error"] and guessing["measurements"] == 2
    others = {rate: float(trials[rate]["score"]["value"]) for rate in (5e-4, 1e-3)}
    assert all(trials[rate]["state"] == "complete" and "error" not in trials[rate] for rate in others)
    assert content["ended_by"] == "the limit of 4 trials is reached"
    assert all(trial["tokens"] > 0 for trial in trials.values())
    best = min(others, key=lambda rate: others[rate])
    assert content["best"] == trials[best]["number"]
    run = run_of(found)
    assert (run.status, run.recipe().training["learning_rate"]) == ("succeeded", best)
    assert run.read("manifest.json")["tune"]["trial"] == content["best"]


class Full(Silent):
    """From the training of a trial on no file may be longer than 256 KiB, which is told as a full disk is."""

    def __init__(self, trial: int) -> None:
        self.words = f"trial {trial}: training"

    def stage(self, text: str, total: int) -> None:
        if text == self.words:
            resource.setrlimit(resource.RLIMIT_FSIZE, (262_144, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_is_no_failure_of_the_trial_that_met_it(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(DiskFull):
            search(tmp_path, *TWO, reporter=Full(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = search(tmp_path, *TWO, write=False)
    assert [trial["state"] for trial in found.read("study.json")["trials"]] == ["complete"] * 2
