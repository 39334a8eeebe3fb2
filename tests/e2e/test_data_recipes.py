"""The recipes that vary how rows are asked and what they say, trained for a few steps on the built-in base."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ift_peft.run_dir import RunDir, open_run
from ift_peft.sections import flat
from tests.conftest import Ift

FEW = (
    "base.device=cpu",
    "data.max_train_rows=48",
    "data.max_test_rows=20",
    "evaluation.max_unseen_rows=6",
    "evaluation.bootstrap_samples=200",
)

pytestmark = pytest.mark.slow


def trained(ift: Ift, folder: Path, *arguments: str) -> RunDir:
    finished = ift("train", *arguments, *FEW, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    (latest,) = folder.glob("runs/*/latest")
    return open_run(latest)


def lines(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / name).read_text("utf-8").splitlines()]


def test_diverse_instructions_are_rendered_for_each_epoch_and_measured_on_unseen_ones(ift: Ift, tmp_path: Path) -> None:
    run = trained(ift, tmp_path, "sentiment-diverse", "training.num_train_epochs=3")
    recipe, manifest, scores = run.recipe(), run.read("manifest.json"), run.read("scores.json")
    assert (manifest["rows"]["train"]["rows"], manifest["rows"]["train"]["variants"]) == (48, 3)
    assert manifest["steps"] == 9
    unseen = lines(run, "predictions-unseen.jsonl")
    assert recipe.evaluation.unseen_instructions is not None
    phrasings = flat(recipe.evaluation.unseen_instructions)
    assert len(unseen) == 6 * len(phrasings) == scores["unseen"]["asked"]
    assert {line["instruction"] for line in unseen} == set(range(len(phrasings)))
    hits = [max(line["adapter"], key=line["adapter"].get) == line["answer"] for line in unseen]
    assert scores["unseen"]["adapter"]["accuracy"]["value"] == pytest.approx(sum(hits) / len(hits), abs=1e-6)
    each = [phrasing["adapter"] for phrasing in scores["unseen"]["phrasings"]]
    assert scores["unseen"]["spread"]["adapter"] == pytest.approx(max(each) - min(each), abs=1e-6)
    held_out = {line["messages"][-2]["content"] for line in lines(run, "test.jsonl")}
    assert not any(
        phrasing.split("{")[0] in prompt for phrasing in phrasings if phrasing.split("{")[0] for prompt in held_out
    )
    again = ift("evaluate", str(run.path))
    assert again.returncode == 0, again.stderr
    assert f"accuracy  {scores['unseen']['base']['accuracy']['value']:.3f}" in again.stdout


def test_augmented_copies_are_trained_on_and_never_measured_on(ift: Ift, tmp_path: Path) -> None:
    run = trained(ift, tmp_path, "sentiment-augmented", "evaluation.unseen_instructions=null")
    manifest, scores = run.read("manifest.json"), run.read("scores.json")
    assert 80 < manifest["rows"]["train"]["rows"] <= 96
    assert any("changed copies of 48 training rows were added" in note for note in manifest["notes"])
    assert manifest["rows"]["test"]["rows"] == 20 == scores["perturbed"]["rows"]
    clean, perturbed = lines(run, "predictions.jsonl"), lines(run, "predictions-perturbed.jsonl")
    assert [line["answer"] for line in clean] == [line["answer"] for line in perturbed]
    assert [line["base"] for line in clean] != [line["base"] for line in perturbed]


def test_what_quality_drops_is_kept_beside_what_is_trained_on(ift: Ift, tmp_path: Path) -> None:
    rows = [{"text": f"房间很大，第{n}次来", "label": "正面"} for n in range(20)]
    rows += [{"text": f"水管漏水，第{n}次修", "label": "负面"} for n in range(20)]
    rows += rows[:5]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "test.jsonl").write_text('{"text": "好", "label": "正面"}\n{"text": "坏", "label": "负面"}\n', "utf-8")
    run = trained(
        ift,
        tmp_path,
        "sentiment",
        "data.train=rows.jsonl",
        "data.test=test.jsonl",
        "data.quality={exact_duplicates: drop, near_duplicates: off, mislabelled: off}",
        "evaluation.unseen_instructions=null",
        "evaluation.perturbation=null",
        "data.max_train_rows=45",
    )
    dropped, kept = lines(run, "dropped.jsonl"), lines(run, "train.jsonl")
    assert [row["where"].rpartition(":")[2] for row in dropped] == ["41", "42", "43", "44", "45"]
    assert {kind for row in dropped for kind in row["kinds"]} == {"exact_duplicates"}
    assert len(kept) == run.read("manifest.json")["rows"]["train"]["rows"] == 40


def test_several_sources_are_mixed_by_weight(ift: Ift, tmp_path: Path) -> None:
    for name, word in (("a", "正面"), ("b", "负面")):
        rows = [{"text": f"{name}{n}", "label": word} for n in range(16)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "mixed.yaml").write_text(
        """
extends: sentiment
data:
  train: null
  test: a.jsonl
  sources:
    - {train: a.jsonl, weight: 0.5}
    - {train: b.jsonl, weight: 2, instruction: 判断。}
  streaming: true
evaluation: {unseen_instructions: null, perturbation: null}
training: {per_device_train_batch_size: 8, num_train_epochs: 2}
""",
        "utf-8",
    )
    (tmp_path / "test.jsonl").write_text('{"text": "好", "label": "正面"}\n{"text": "坏", "label": "负面"}\n', "utf-8")
    finished = ift("train", "mixed.yaml", "base.device=cpu", "data.test=test.jsonl")
    assert finished.returncode == 0, finished.stderr
    run = open_run(tmp_path / "runs" / "mixed" / "latest")
    assert run.read("manifest.json")["rows"]["train"]["rows"] == 32
    assert run.read("manifest.json")["steps"] == 2 * (16 // 2 + 16 * 2) // 8


def test_a_curve_goes_on_where_it_stopped_and_its_runs_compare(ift: Ift, tmp_path: Path) -> None:
    plain = ("evaluation.unseen_instructions=null", "evaluation.perturbation=null")
    few = [setting for setting in FEW if "train_rows" not in setting and "unseen" not in setting]
    refused = ift("curve", "sentiment", *few, *plain, "--rows", "16,1000000")
    assert refused.returncode == 2
    assert "at most 9402 training rows" in refused.stderr
    for rows in ("16", "16,32"):
        finished = ift("curve", "sentiment", *few, *plain, "--rows", rows, "--output", "curve")
        assert finished.returncode == 0, finished.stderr
    points = json.loads((tmp_path / "curve" / "curve.json").read_text("utf-8"))["points"]
    assert [point["rows"] for point in points] == [16, 32]
    runs = sorted(path for path in (tmp_path / "runs" / "sentiment").iterdir() if not path.is_symlink())
    assert [(tmp_path / "curve" / name).resolve() for point in points for name in point["runs"]] == runs
    compared = ift("compare", *map(str, runs), "--output", "comparison")
    assert compared.returncode == 0, compared.stderr
    assert "sentiment (data.max_train_rows=32) - sentiment (data.max_train_rows=16)" in compared.stdout
    assert str(tmp_path) not in (tmp_path / "comparison" / "comparison.json").read_text("utf-8")


def test_seeds_are_trained_one_after_another_and_pooled(ift: Ift, tmp_path: Path) -> None:
    plain = ("evaluation.unseen_instructions=null", "evaluation.perturbation=null")
    finished = ift("train", "sentiment", *FEW, *plain, "--seeds", "2")
    assert finished.returncode == 0, finished.stderr
    runs = [path for path in (tmp_path / "runs" / "sentiment").iterdir() if not path.is_symlink()]
    assert sorted(RunDir(path).recipe().training["seed"] for path in runs) == [0, 1]
    (line,) = (line for line in finished.stdout.splitlines() if line.startswith("sentiment "))
    assert re.search(r"\] +2 ", line)
