"""Which trial comes next, what a budget leaves, and what a killed session leaves behind."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from ift_peft.errors import RunError
from ift_peft.selection import Span, Tune
from ift_peft.tune.asking import Asker, open_study
from ift_peft.tune.budget import Budget
from ift_peft.tune.search import distributions
from ift_peft.tune.table import finished

SPACE = distributions({"x": Span(low=0.001, high=10, log=True), "r": (4, 8, 16)})
OWN = {"x": 1.0, "r": 8}


def asker(folder: Path, *, trials: int = 100, own: dict[str, Any] | None = None, **settings: Any) -> Asker:
    folder.mkdir(exist_ok=True)
    section = Tune(trials=trials, **settings)
    budget = Budget(folder / "budget.json", section.limits)
    study = open_study(folder, minimize=False)
    return Asker(study, section, SPACE, own or OWN, budget, note=lambda text: None)


def settle(asker: Asker, value: float, *, improving: bool = False) -> dict[str, Any]:
    """Ask for a trial and end it with `value`."""
    trial = asker.next()
    trial.set_user_attr("improving", improving)
    asker.study.tell(trial, value)
    return dict(trial.user_attrs)


def test_a_study_in_many_sessions_draws_what_one_session_draws(tmp_path: Path) -> None:
    one = asker(tmp_path / "one")
    whole = [settle(one, -abs(number - 7))["settings"] for number in range(10)]
    assert whole[0] == OWN
    assert len({settings["x"] for settings in whole}) == 10
    parts = [settle(asker(tmp_path / "many"), -abs(number - 7))["settings"] for number in range(10)]
    assert parts == whole


def test_a_trial_that_was_running_is_gone_on_with_also_where_it_was_being_drawn(tmp_path: Path) -> None:
    first = asker(tmp_path / "a")
    settle(first, 0.5)
    trial = first.next()
    again = asker(tmp_path / "a").running()
    assert again is not None
    assert (again.number, again.user_attrs["settings"]) == (1, trial.user_attrs["settings"])
    cut = asker(tmp_path / "b")
    settle(cut, 0.5)
    cut.study.ask()  # killed before anything was drawn for it
    found = asker(tmp_path / "b").running()
    assert found is not None
    assert found.user_attrs["settings"] == trial.user_attrs["settings"]
    assert asker(tmp_path / "c").running() is None


@pytest.mark.parametrize("number", [1, 2])
def test_a_trial_is_asked_for_as_it_would_have_been_wherever_that_was_killed(tmp_path: Path, number: int) -> None:
    """Every beginning of the journal of asking for a drawn trial, and for one that continues the best."""

    def journal() -> list[str]:
        return (tmp_path / "whole" / "journal.log").read_text("utf-8").splitlines(keepends=True)

    one = asker(tmp_path / "whole", trials=3)
    for _ in range(number):
        settle(one, 0.5, improving=True)
    before = len(journal())
    trial = one.next()
    after = len(journal())
    assert after > before + 2
    assert ("continued_from" in trial.user_attrs) == (number == 2)
    for kept in range(before + 1, after + 1):
        folder = tmp_path / str(kept)
        folder.mkdir()
        (folder / "journal.log").write_text("".join(journal()[:kept]), "utf-8")
        again = asker(folder, trials=3).running()
        assert again is not None
        assert (again.number, again.user_attrs, again.params) == (number, trial.user_attrs, trial.params)


def test_a_journal_cut_within_a_line_and_its_stale_lock_are_mended(tmp_path: Path) -> None:
    settle(asker(tmp_path), 0.5)
    with (tmp_path / "journal.log").open("a") as file:
        file.write('{"op_code":4,"wor')
    os.symlink(tmp_path / "journal.log", tmp_path / "journal.log.lock")
    after = asker(tmp_path)
    settle(after, 0.6)
    assert [trial.value for trial in asker(tmp_path).study.trials] == [0.5, 0.6]


def test_own_settings_outside_the_search_are_tried_first_all_the_same(tmp_path: Path) -> None:
    one = asker(tmp_path, own={"x": 99.0, "r": 5})
    assert settle(one, 0.5)["settings"] == {"x": 99.0, "r": 5}
    assert one.study.trials[0].params == {}
    assert 0.001 <= settle(one, 0.5)["settings"]["x"] <= 10


def test_the_best_trial_is_continued_once_when_it_improved_and_half_is_spent(tmp_path: Path) -> None:
    one = asker(tmp_path / "a", trials=6)
    kinds = [settle(one, value, improving=True) for value in (0.5, 0.9, 0.4)]
    assert all("continued_from" not in kind for kind in kinds)  # less than half was spent when they were asked
    continued = settle(one, 0.8, improving=True)
    assert continued["continued_from"] == 1
    assert continued["settings"] == kinds[1]["settings"]
    assert "continued_from" not in settle(one, 0.3)  # trial 1 is still the best, and was continued
    assert one.study.trials[3].params == {}  # so that the sampler does not take it for a trial of its own
    chain = asker(tmp_path / "b", trials=2)
    settle(chain, 0.5, improving=True)
    settle(chain, 0.6, improving=True)
    last = chain.next()
    assert chain.ancestors(last) == [1, 0]
    not_improving = asker(tmp_path / "c", trials=2)
    settle(not_improving, 0.5)
    assert "continued_from" not in settle(not_improving, 0.5)
    off = asker(tmp_path / "d", trials=2, continue_best=False)
    settle(off, 0.5, improving=True)
    assert "continued_from" not in settle(off, 0.5)


def test_settings_tried_before_are_recognised_and_a_continuation_is_none_of_them(tmp_path: Path) -> None:
    one = asker(tmp_path, trials=2)
    settle(one, 0.5, improving=True)
    one.study.enqueue_trial(OWN)
    assert one.same_as(one.next()) is None  # it continues trial 0
    one.study.tell(1, state=TrialState.FAIL)
    one.study.enqueue_trial(OWN)
    same = one.same_as(one.next())
    assert same is not None
    assert same.number == 0


def test_a_budget_adds_up_over_sessions_and_holds_back_what_the_end_takes(tmp_path: Path) -> None:
    now = 100.0
    path = tmp_path / "budget.json"
    budget = Budget(path, {"minutes": 1.0, "tokens": 1000}, clock=lambda: now)
    now = 130.0
    budget.spend(400)
    budget.write()
    again = Budget(path, {"minutes": 1.0, "tokens": 1000}, clock=lambda: now)
    assert (again.seconds, again.tokens) == (30.0, 400)
    assert again.half_spent(0)
    assert again.exceeded(0) is None
    again.reserve = 30.0
    assert again.exceeded(0) == "minutes"
    again.reserve = 0.0
    again.spend(600)
    assert again.exceeded(0) == "tokens"
    assert Budget(tmp_path / "other.json", {"trials": 3}).exceeded(3) == "trials"
    path.write_text("{", "utf-8")
    with pytest.raises(RunError, match="--fresh"):
        Budget(path, {})


def test_what_is_spent_is_written_down_whatever_the_process_is_at(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    budget = Budget(path, {})
    with budget.kept():
        budget.spend(7)
        while not path.is_file():  # nothing here writes
            time.sleep(0.05)
        first = json.loads(path.read_text("utf-8"))
        assert first["tokens"] == 7
        while json.loads(path.read_text("utf-8")) == first:
            time.sleep(0.05)
    assert Budget(path, {}).seconds >= first["seconds"]


def test_a_trial_that_repeats_another_counts_for_no_limit(tmp_path: Path) -> None:
    one = asker(tmp_path, trials=2)
    settle(one, 0.5)
    repeated = one.next()
    repeated.set_user_attr("same_as", 0)
    one.study.tell(repeated, state=TrialState.FAIL)
    assert (len(one.study.trials), finished(one.study)) == (2, 1)
