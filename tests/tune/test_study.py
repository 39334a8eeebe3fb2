"""A whole search: what it looks at, when it ends, what it leaves, and that killing it loses and repeats nothing."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from optuna.trial import Trial
from safetensors.torch import load_file
from typer.testing import CliRunner

from ift_peft.cli import app
from ift_peft.errors import IftPeftError, RunError, TrainingError
from ift_peft.evaluate.run import evaluate_run
from ift_peft.recipe import load_recipe
from ift_peft.reporter import Reporter, Silent
from ift_peft.run_dir import RunDir, RunIsBusy, list_runs, open_run
from ift_peft.train.opening import open_session
from ift_peft.train.prepare import prepare
from ift_peft.train.run import train
from ift_peft.train.session import Interrupted
from ift_peft.tune.asking import open_study
from ift_peft.tune.study import tune
from tests.conftest import OFFLINE, ROOT, Ift
from tests.train.small import small, write_small

pytestmark = pytest.mark.slow

SETTINGS = ("training.max_steps=4", "training.learning_rate=5e-4", "validation={every: 2, metric: loss}")
CHECKPOINT = "runs/small/tune-*/trials/001/checkpoints/checkpoint-2/trainer_state.json"
TARGET = "evaluation.target.accuracy=0.9999"  # beyond the interval of a handful of rows, all of them right
TWO = ("tune.trials=2", "tune.continue_best=false", "training.max_steps=2")
SEARCH = "tune.search={training.learning_rate: {low: 1e-4, high: 1e-2, log}, adapter.r: [2, 4, 8]}"


def search(
    folder: Path, *overrides: str, fresh: bool = False, write: bool = True, reporter: Reporter | None = None
) -> RunDir:
    if write:
        write_small(folder)
    recipe = load_recipe(str(folder / "small.yaml"), [*SETTINGS, SEARCH, *overrides])
    return tune(recipe, root=folder / "runs", fresh=fresh, reporter=reporter or Silent())


class Leaving(Silent):
    """Ends the process's work, as a second Ctrl-C does, at the first stage whose name has `words` in it."""

    def __init__(self, words: str) -> None:
        self.words = words

    def stage(self, text: str, total: int) -> None:
        if self.words in text:
            raise KeyboardInterrupt


class Stopping(Silent):
    """Sends this process a real SIGINT when a training has done `after` steps; counts models that outlive theirs."""

    def __init__(self, after: int = 0) -> None:
        self.after, self.training = after, False
        gc.collect()
        self.before = models()
        self.left: list[int] = []

    def note(self, text: str) -> None:
        if re.match(r"trial \d+: training\.learning_rate=", text):  # it begins
            self.left.append(len(models() - self.before))

    def stage(self, text: str, total: int) -> None:
        self.training = text.endswith(": training")

    def advance(self, done: int, detail: str = "") -> None:
        if self.training and done == self.after:
            os.kill(os.getpid(), signal.SIGINT)


def models() -> set[int]:
    """The models with an adapter that are in memory."""
    return {id(one) for one in gc.get_objects() if type(one).__name__ == "PeftModelForCausalLM"}


def run_of(study: RunDir) -> RunDir:
    return open_run(study.path / study.read("study.json")["run"])


def outcomes(study: RunDir) -> list[dict[str, Any]]:
    """The trials of a study without the time they took."""
    return [
        {name: value for name, value in trial.items() if name != "seconds"}
        for trial in study.read("study.json")["trials"]
    ]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Three trials, the last of which continues the better of the first two."""
    return search(tmp_path_factory.mktemp("study"), "tune.trials=3", TARGET)


def test_the_first_trial_is_the_recipes_own_and_the_best_becomes_a_whole_run(study: RunDir) -> None:
    found = study.read("study.json")
    first, second, third = found["trials"]
    assert first["settings"] == {"training.learning_rate": 5e-4, "adapter.r": 4}
    assert second["settings"] != first["settings"]
    assert third["continued_from"] == min((first, second), key=lambda trial: float(trial["score"]["value"]))["number"]
    best = found["trials"][found["best"]]
    assert best["score"]["value"] == min(trial["score"]["value"] for trial in found["trials"])
    run = run_of(study)
    manifest = run.read("manifest.json")
    assert manifest["best"]["value"] == best["score"]["value"]
    assert manifest["tune"]["trial"] == best["number"]
    assert run.recipe().training["learning_rate"] == best["settings"]["training.learning_rate"]
    assert run.recipe().adapter.r == best["settings"]["adapter.r"]
    assert [one.path for one in list_runs(study.path.parent.parent)] == [run.path]
    kept = study.path / "trials" / f"{best['number']:03d}" / "checkpoints" / f"checkpoint-{best['best_step']}"
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (run.adapter, kept))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    scores = run.read("scores.json")
    assert evaluate_run(run, data=None, reporter=Silent()) | {"gates": scores["gates"]} == scores
    with_checkpoints = [path.parent.name for path in study.path.glob("trials/*/checkpoints")]
    assert with_checkpoints == [f"{best['number']:03d}"]


def test_a_continued_trial_begins_with_the_weights_it_continues(study: RunDir, tmp_path: Path) -> None:
    best = run_of(study)
    (checkpoint,) = best.checkpoints.glob(f"checkpoint-{best.read('manifest.json')['best']['step']}")
    recipe = best.recipe()
    session = open_session(recipe, prepare(recipe, Silent()), RunDir(tmp_path), Silent(), start_from=checkpoint)
    stored = load_file(checkpoint / "adapter_model.safetensors")
    ours = {name.replace(".default", ""): value for name, value in session.model.named_parameters()}
    adapter = [name for name in stored if "lora_" in name]
    assert adapter
    assert all(torch.equal(ours[name], stored[name]) and ours[name].requires_grad for name in adapter)


def test_the_search_never_looks_at_the_held_out_rows(study: RunDir, tmp_path: Path) -> None:
    """Other held-out texts with other labels: every trial is the same, the result is another."""
    write_small(tmp_path)
    rows = [{"text": f"另一句话{number}", "label": ("正面", "负面")[number % 2]} for number in range(8)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    other = search(tmp_path, "tune.trials=3", TARGET, write=False)
    assert outcomes(other) == outcomes(study)
    assert run_of(other).read("scores.json")["rows"] == 8
    held_out = {json.loads(line)["text"] for line in run_of(other).test_rows.read_text("utf-8").splitlines()}
    chosen_by = (run_of(other).path / "validation.jsonl").read_text("utf-8").splitlines()
    assert held_out == {row["text"] for row in rows}
    assert len(chosen_by) == 6
    assert not held_out & {json.loads(line)["text"] for line in chosen_by}


def test_a_study_killed_within_its_second_trial_loses_and_repeats_nothing(
    study: RunDir, tmp_path: Path, ift: Ift
) -> None:
    write_small(tmp_path)
    asked = ("tune", "small.yaml", *SETTINGS, SEARCH, TARGET, "--trials", "3")
    command = [sys.executable, "-m", "ift_peft", *asked]
    environment = {**os.environ, "PYTHONPATH": f"{OFFLINE}{os.pathsep}{ROOT}"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        while process.poll() is None and not any(tmp_path.glob(CHECKPOINT)):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL, (tmp_path / "log").read_text("utf-8")
    (folder,) = tmp_path.glob("runs/small/tune-*")
    first = folder / "trials" / "000"
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir() if path.is_file()}
    spent = json.loads((folder / "budget.json").read_text("utf-8"))
    assert spent["tokens"] > 0
    finished = ift(*asked)
    assert finished.returncode == 8, finished.stderr
    assert "trial 1 goes on from checkpoint-" in finished.stderr, finished.stderr
    again = RunDir(folder)
    differing = ("tokens",)  # steps after the last checkpoint were taken twice, and are paid twice
    assert [{k: v for k, v in trial.items() if k not in differing} for trial in outcomes(again)] == [
        {k: v for k, v in trial.items() if k not in differing} for trial in outcomes(study)
    ]
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir() if path.is_file()} == before
    found = again.read("study.json")
    assert found["spent"]["trials"] == 3
    assert found["spent"]["tokens"] >= spent["tokens"]
    assert sum(trial["tokens"] for trial in found["trials"]) == found["spent"]["tokens"]
    assert all(one["tokens"] >= other["tokens"] for one, other in zip(outcomes(again), outcomes(study), strict=True))
    assert run_of(again).read("scores.json") == run_of(study).read("scores.json")
    assert "optimistic" in finished.stdout


def test_once_measuring_has_begun_no_limit_brings_another_trial(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        search(tmp_path, *TWO, reporter=Leaving("measuring"))
    found = search(tmp_path, *TWO, "tune.trials=4", "evaluation.forgetting=true", write=False)
    content = found.read("study.json")
    assert len(content["trials"]) == 2
    assert content["ended_by"] == "the limit of 2 trials is reached"
    run = run_of(found)
    assert run.read("manifest.json")["tune"]["trial"] == content["best"]
    assert [one.path for one in list_runs(tmp_path / "runs")] == [run.path]
    assert run.read("scores.json")["forgetting"]  # which decides no trial, so that the study is the same
    (found.path / "study.json").unlink()
    run.update_manifest(tune={"trial": 1 - content["best"]})
    with pytest.raises(RunError, match="the best"):
        search(tmp_path, *TWO, write=False)


def test_what_is_drawn_is_trained_also_where_our_default_is_another_than_that_of_sft_config(tmp_path: Path) -> None:
    strategies = "tune.search={training.train_sampling_strategy: [random, group_by_length]}"
    found = search(tmp_path, strategies, *TWO)
    trained = [trial for trial in found.read("study.json")["trials"] if "same_as" not in trial]
    kinds = [trial["settings"]["training.train_sampling_strategy"] for trial in trained]
    assert kinds == ["group_by_length", "random"]  # the recipe as it stands, and the other
    files = [found.path / "trials" / f"{trial['number']:03d}" / "recipe.yaml" for trial in trained]
    sections = [yaml.safe_load(file.read_text("utf-8"))["training"] for file in files]
    assert [section.get("train_sampling_strategy", "group_by_length") for section in sections] == kinds


def test_a_signal_in_the_last_step_of_a_trial_ends_the_search_and_no_model_outlives_its_trial(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="trial 0, which is over") as caught:
        search(tmp_path, *TWO, reporter=Stopping(2))
    assert caught.value.exit_code == 130
    seen = Stopping()
    found = search(tmp_path, *TWO, "tune.trials=3", reporter=seen, write=False)
    assert [trial["state"] for trial in found.read("study.json")["trials"]] == ["complete"] * 3
    assert seen.left == [0, 0]  # trial 0 was not begun again


def test_a_limit_whose_checkpoint_was_never_written_is_forgotten_when_training_goes_on(tmp_path: Path) -> None:
    settings = (*TWO, "tune.trials=1", "training.max_steps=4")
    with pytest.raises(Interrupted, match="after step 2"):
        search(tmp_path, *settings, reporter=Stopping(2))
    (folder,) = tmp_path.glob("runs/small/tune-*")
    study = open_study(folder, minimize=True)
    trial = Trial(study, study.trials[0]._trial_id)
    trial.set_user_attr("ended", {"why": "tokens", "step": 1})  # as if killed there, and gone on under other limits
    (found,) = search(tmp_path, *settings, write=False).read("study.json")["trials"]
    assert found["steps"] == 4
    assert "stopped_by" not in found


def test_a_target_that_can_be_met_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small(tmp_path)
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["tune", "small.yaml", *SETTINGS, "evaluation.target.accuracy=0.01", "--trials=5"])
    assert ended.exit_code == 0, ended.output
    (found,) = tmp_path.glob("runs/small/tune-*/study.json")
    content = json.loads(found.read_text("utf-8"))
    assert len(content["trials"]) == 1
    assert content["ended_by"] == "the target is met on the validation rows"
    assert set(content["trials"][0]["settings"]) == {"training.learning_rate", "adapter.r"}
    (gate,) = run_of(RunDir(found.parent)).read("scores.json")["gates"]
    assert gate["met"]


def test_a_finished_study_that_missed_its_target_is_shown_with_exit_code_8_and_not_searched_again(
    study: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert study.read("study.json")["ended_by"] == "the limit of 3 trials is reached"
    files = {path: path.stat().st_mtime_ns for path in study.path.rglob("*") if path.is_file() and path.name != ".lock"}
    monkeypatch.chdir(study.path.parent.parent.parent)
    again = CliRunner().invoke(app, ["tune", "small.yaml", *SETTINGS, SEARCH, TARGET, "--trials=4"])
    assert again.exit_code == 8
    assert "this study is finished" in again.output
    assert "accuracy at least 0.9999" in again.output
    assert files == {path: path.stat().st_mtime_ns for path in files}
    with study.locked(), pytest.raises(RunIsBusy):
        search(study.path.parent.parent.parent, "tune.trials=3", TARGET, write=False)


def test_a_trial_over_the_budget_stops_after_its_step_with_its_last_score(tmp_path: Path) -> None:
    found = search(tmp_path, "tune.tokens=150", "validation.every=1", "training.max_steps=40").read("study.json")
    (trial,) = found["trials"]
    assert (trial["state"], trial["stopped_by"]) == ("complete", "tokens")
    assert 1 < trial["steps"] < 10
    assert trial["measurements"] == trial["steps"] - 1  # none after the step that used it up
    assert 150 <= found["spent"]["tokens"] < 300


def test_a_trial_that_the_trainer_refuses_has_failed_and_the_search_goes_on(tmp_path: Path) -> None:
    schedules = "tune.search={training.lr_scheduler_type: [linear, cosine_with_min_lr]}"  # which needs a min_lr
    found = search(tmp_path, schedules, *TWO)
    first, second = found.read("study.json")["trials"]
    assert (first["state"], first["settings"]) == ("complete", {"training.lr_scheduler_type": "linear"})
    assert (second["state"], second["settings"]) == ("fail", {"training.lr_scheduler_type": "cosine_with_min_lr"})
    assert "min_lr" in second["error"]
    assert run_of(found).read("manifest.json")["tune"]["trial"] == 0
    alone = small(tmp_path / "alone", "training.lr_scheduler_type=cosine_with_min_lr")
    with pytest.raises(TrainingError, match="min_lr"):
        train(alone, root=tmp_path / "alone", reporter=Silent())


ANSWERS = ("data.labels=null", "data.columns={text: text, answer: label}", "validation={every: 2}")
MIX = (
    "data={sources: [{train: rows.jsonl, test: test.jsonl, name: reviews, labels: [负面, 正面]}, {train: more.jsonl, "
    "test: more-test.jsonl, name: answers, columns: {text: text, answer: label}}], instruction: 正面还是负面？}",
    "validation={every: 2}",
)
CLASSIFIER = ("base.head=sequence-classification", "adapter.embeddings=false", "validation={every: 2}")


@pytest.mark.parametrize(
    ("overrides", "metric"),
    [(ANSWERS, "loss"), (MIX, "loss"), (CLASSIFIER, "accuracy")],
    ids=["answers", "mix", "head"],
)
def test_answers_mixes_and_classifiers_are_searched_by_what_their_validation_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], metric: str
) -> None:
    write_small(tmp_path)
    for name, other in (("rows", "more"), ("test", "more-test")):
        shutil.copy(tmp_path / f"{name}.jsonl", tmp_path / f"{other}.jsonl")
    monkeypatch.chdir(tmp_path)  # the paths of overrides
    found = search(tmp_path, *TWO, *overrides, write=False)
    content = found.read("study.json")
    values = [trial["score"]["value"] for trial in content["trials"]]
    assert content["metric"] == metric
    assert content["best"] == values.index((min if metric == "loss" else max)(values))
    run = run_of(found)
    best = run.read("manifest.json")["best"]
    assert (best["metric"], best["value"]) == (metric, pytest.approx(values[content["best"]], abs=1e-6))
    assert metric in run.read("scores.json")["adapter"]


def test_a_limit_before_the_first_measurement_brings_that_measurement(tmp_path: Path) -> None:
    found = search(tmp_path, "tune.tokens=150", "validation.every=epoch", "training.max_steps=40")
    (trial,) = found.read("study.json")["trials"]
    assert (trial["state"], trial["stopped_by"], trial["measurements"]) == ("complete", "tokens", 1)
    assert 1 < trial["steps"] == trial["best_step"] < 10
    manifest = run_of(found).read("manifest.json")
    assert manifest["best"] == {"step": trial["steps"], "metric": "loss", "value": trial["score"]["value"]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tune.search={adapter.rr: [4, 8]}", r"'rr' at tune\.search: adapter\.rr"),
        ("evaluation.target={accuracy: 0.5, bleu: 0.5}", "bleu"),
        ("data.streaming=true", "streaming"),
        ("evaluation={forgetting: true, general_text: none.txt}", "none.txt"),
        ("evaluation.safety={harmful: none.txt}", "none.txt"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_anything_is_made(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(IftPeftError, match=message) as caught:
        tune(small(tmp_path, override), root=tmp_path / "runs", fresh=False, reporter=Silent())
    assert caught.value.exit_code == (3 if "none.txt" in override else 2)
    assert not (tmp_path / "runs").exists()
