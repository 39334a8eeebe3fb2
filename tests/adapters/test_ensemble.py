"""Runs that answer together: what each says alone, made into one, on one base in memory where they share it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from ift_peft.cli import app
from ift_peft.errors import RunError
from ift_peft.evaluate.ensemble import ensemble_scores, evaluate_ensemble
from ift_peft.evaluate.metrics import Resampling
from ift_peft.infer.ensemble import answer_together, check_members, open_members, together
from ift_peft.infer.load import open_parts
from ift_peft.infer.temperature import at_temperature
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from tests.adapters.conftest import trained

TEXTS = ["手机很好", "书很差", "这个茶不错"]


def ift(*arguments: Any, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def predicted(folder: Path, *arguments: Any) -> list[dict[str, Any]]:
    texts, output = folder / "texts.jsonl", folder / "answers.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    result = ift("predict", *arguments, "--input", texts, "--output", output)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_an_ensemble_is_the_mean_of_what_predict_says(
    one: RunDir, two: RunDir, elsewhere: RunDir, classifier: RunDir, tmp_path: Path
) -> None:
    """Of adapters on one base, on another, and of a classifier that has the labels in another order."""
    runs = [one, two, elsewhere, classifier]
    alone = [predicted(tmp_path, run.path) for run in runs]
    for kind in ("mean_probs", "vote"):
        for number, line in enumerate(predicted(tmp_path, *(run.path for run in runs), "--ensemble", kind)):
            table = np.array([[[own[number]["probabilities"][label] for label in ("负面", "正面")]] for own in alone])
            wanted = together(table, kind)[0]  # type: ignore[arg-type]
            assert list(line["probabilities"].values()) == pytest.approx(wanted, abs=2e-6)
            assert line["answer"] == ("负面", "正面")[int(wanted.argmax())]
            if kind == "mean_probs":
                mean = sum(own[number]["probabilities"]["正面"] for own in alone) / 4
                assert line["probabilities"]["正面"] == pytest.approx(mean, abs=2e-6)


@pytest.mark.slow
def test_a_base_is_in_memory_once(one: RunDir, two: RunDir, elsewhere: RunDir, classifier: RunDir) -> None:
    members, _ = open_members([open_parts(run) for run in (one, elsewhere, two, classifier)])
    assert members[0].model is members[2].model
    assert len({id(member.model) for member in members}) == 3
    assert [member.parts.run.path for member in members] == [run.path for run in (one, elsewhere, two, classifier)]


@pytest.mark.slow
def test_adapters_of_one_base_answer_in_one_batch(one: RunDir, two: RunDir) -> None:
    members, notes = open_members([open_parts(run) for run in (one, two)])
    assert "2 adapters of one base answer in one batch" in notes
    rows: list[int] = []
    members[0].model.register_forward_pre_hook(
        lambda _, __, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    questions = [[member.parts.ask(text) for text in TEXTS] for member in members]
    assert len(list(answer_together(members, questions, labels=("负面", "正面"), kind="vote"))) == len(TEXTS)
    assert set(rows) == {len(members) * len(TEXTS)}


@pytest.mark.slow
def test_members_score_what_their_runs_say(one: RunDir, two: RunDir) -> None:
    scores = evaluate_ensemble([one, two, one], "mean_probs", data=None, reporter=Silent())
    names = ["/".join(run.path.parts[-2:]) for run in (one, two)]
    assert list(scores["members"]) == [f"{names[0]} (1)", names[1], f"{names[0]} (3)"]
    for name, run in zip((f"{names[0]} (1)", names[1]), (one, two), strict=True):
        stored = run.read("scores.json")
        assert scores["members"][name]["accuracy"] == stored["adapter"]["accuracy"]
        assert scores["members"][name]["nll"] == pytest.approx(stored["calibration"]["adapter"]["nll"], abs=2e-6)
    printed = ift("evaluate", one.path, two.path, "--ensemble", "vote")
    assert printed.exit_code == 0, printed.output
    voted = evaluate_ensemble([one, two], "vote", data=None, reporter=Silent())
    assert voted["verdict"] in printed.stdout and "differences, paired" in printed.stdout


@pytest.mark.slow
def test_other_rows_labels_and_texts_among_the_runs_are_refused(
    one: RunDir, two: RunDir, other: RunDir, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"负面, 正面\n *found cold, warm in other/"):
        check_members([open_parts(one), open_parts(other)])
    with pytest.raises(RunError, match="at least two"):
        check_members([open_parts(one)])
    refused = ift("predict", one.path, "手机很好", "--ensemble", "vote")
    assert refused.exit_code == 5 and "run folders alone" in refused.stderr
    several = ift("evaluate", one.path, two.path)
    assert several.exit_code == 5 and "ift compare" in several.stderr
    rows = tmp_path / "more.jsonl"
    rows.write_text('{"text": "书不错", "label": "正面"}\n{"text": "酒很差", "label": "负面"}\n', "utf-8")
    scores = evaluate_ensemble([one, two], "vote", data=rows, reporter=Silent())
    assert scores["rows"] == 2


def test_the_verdict_says_so_where_the_ensemble_is_not_better_than_its_best_member() -> None:
    truth = [0, 1] * 100
    right = np.eye(2)[truth] * 0.8 + 0.1
    weak = right.copy()
    weak[:120] = weak[:120, ::-1]
    none = ensemble_scores(truth, ["a", "b"], {"right": right, "same": right}, "mean_probs", Resampling(200))
    assert none["best"] == "right" and none["change"]["right"]["accuracy"]["value"] == 0
    assert none["verdict"].startswith("not shown to be better than its best member, right")
    worse = ensemble_scores(truth, ["a", "b"], {"right": right, "w": weak, "v": weak}, "vote", Resampling(200))
    assert worse["verdict"].startswith("the ensemble is worse")
    thirds = []
    for start in range(3):  # each wrong on another third of the rows
        one = right.copy()
        one[start::3] = one[start::3, ::-1]
        thirds.append(one)
    members = dict(zip("xyz", thirds, strict=True))
    better = ensemble_scores(truth, ["a", "b"], members, "vote", Resampling(200))
    assert better["verdict"].startswith("the ensemble is better")
    assert better["ensemble"]["accuracy"]["value"] == 1


@pytest.mark.slow
def test_an_ensemble_is_calibrated_by_validation_rows(runs_root: Path, one: RunDir) -> None:
    runs = [trained(runs_root, "name=validated", "validation.size=12", f"training.seed={seed}") for seed in (0, 1)]
    plain = evaluate_ensemble(runs, "mean_probs", data=None, reporter=Silent())
    found = evaluate_ensemble(runs, "mean_probs", data=None, reporter=Silent(), calibrate=True)
    assert found["ensemble"]["accuracy"] == plain["ensemble"]["accuracy"] and found["members"] == plain["members"]
    assert found["temperature"] != 1 and found["ensemble"]["nll"] != plain["ensemble"]["nll"]
    folders = [str(run.path) for run in runs]
    options = ("--ensemble", "mean_probs")
    asked = [ift("predict", *folders, *options, *more, stdin="手机很好\n") for more in ((), ("--calibrate",))]
    before, after = (float(done.stdout.split("正面 ")[1].split()[0]) for done in asked)
    table = at_temperature(np.array([[1 - before, before]]), found["temperature"])
    assert after == pytest.approx(float(table[0, 1]), abs=2e-3)
    with pytest.raises(RunError, match="validation rows in every run"):
        evaluate_ensemble([runs[0], one], "mean_probs", data=None, reporter=Silent(), calibrate=True)
    alone = ift("predict", folders[0], "好", "--calibrate")
    assert alone.exit_code == 5 and "--calibrate with --ensemble" in alone.stderr
