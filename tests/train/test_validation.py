"""Validation during training: which rows, when it stops, which weights are kept, and that measuring changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ift_peft.data.rows import from_saved
from ift_peft.errors import Faults, RecipeError
from ift_peft.evaluate.compare import Predictions
from ift_peft.evaluate.metrics import Resampling
from ift_peft.recipe import load_recipe
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.train.prepare import prepare
from ift_peft.train.run import resume, train
from ift_peft.train.session import Interrupted
from ift_peft.train.validation import validation_scores, without_autocast
from tests.train.small import small, write_small


class Stopping(Silent):
    """Sends this process a real SIGINT when training has done `after` steps."""

    def __init__(self, after: int) -> None:
        self.after, self.training = after, False

    def stage(self, text: str, total: int) -> None:
        self.training = text == "training"

    def advance(self, done: int, detail: str = "") -> None:
        if self.training and done == self.after:
            os.kill(os.getpid(), signal.SIGINT)


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text("utf-8").splitlines()]


def measurements(run: RunDir) -> list[dict[str, Any]]:
    return [line for line in lines(run) if "eval_loss" in line]


def losses(run: RunDir) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(run) if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's own tensors; checkpoints of an adapter on the embedding hold the base's embedding as well."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "lora_" in name}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    assert one
    return all(torch.equal(one[name], other[name]) for name in one)


def test_rows_are_set_aside_from_training_by_label_and_source(tmp_path: Path) -> None:
    write_small(tmp_path)
    both = f"data.sources=[{{train: {tmp_path}/rows.jsonl}}, {{train: {tmp_path}/more.jsonl}}]"
    more = [{"text": f"第{number}本书", "label": "正面"} for number in range(20)]
    more += [{"text": "手机很好", "label": "正面"}]  # a text of the other source
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in more), "utf-8")
    recipe = load_recipe(str(tmp_path / "small.yaml"), ["data.train=null", both, "validation={size: 0.2}"])
    prepared = prepare(recipe, Silent())
    assert prepared.validation is not None
    aside = prepared.validation.rows
    assert prepared.train.rows + len(aside) == 81
    counts = Counter((row.source, row.label) for row in aside)
    assert counts[0, "负面"] == 6
    assert counts[0, "正面"] + counts[1, "正面"] in (10, 11)
    trained = {tuple(ids) for ids in prepared.train.dataset["input_ids"]}
    assert not trained & {tuple(row.input_ids) for row in prepared.validation.rendered}
    again = prepare(recipe, Silent()).validation
    assert again is not None
    assert [row.where for row in again.rows] == [row.where for row in aside]
    held_out = {row.text for row in prepared.test.rows}  # of a file of their own: their places tell nothing
    assert held_out
    assert not held_out & {row.text for row in aside}
    split = prepare(load_recipe(str(tmp_path / "small.yaml"), ["data.test=null", "validation={size: 0.2}"]), Silent())
    assert split.validation is not None
    parts = [{row.where for row in part.rows} for part in (split.validation, split.test)]
    assert not parts[0] & parts[1]
    assert [len(part) for part in parts] == [10, 12]  # of 48 rows that are left, and of 60
    assert split.train.rows == 38
    whole = prepare(recipe.model_copy(update={"validation": None}), Silent())
    assert whole.train.rows == 81  # not those that the cache has of the same files with rows set aside


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.streaming=true"], "data.streaming"),
        (["data.labels=null", "validation.metric=accuracy"], r"metric=loss where data has no labels"),
        (["training.save_strategy=no"], "save_strategy"),
        (["training.save_total_limit=1"], "at least 2"),
        (["training.load_best_model_at_end=true"], "section `validation`"),
        (["training.eval_steps=5"], r"validation\.every"),
        (["validation.every=sometimes"], "every"),
    ],
)
def test_what_validation_cannot_go_with_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = write_small(tmp_path)
    with pytest.raises((RecipeError, Faults), match=message):
        load_recipe(str(path), ["validation.size=0.1", *overrides])


def test_the_loss_of_labels_is_that_of_the_true_class() -> None:
    import numpy as np

    rows = [from_saved({"messages": [{"role": "assistant", "content": label}], "where": label}) for label in "ab"]
    predictions = Predictions(probabilities=np.array([[0.8, 0.2], [0.6, 0.4]]))
    scores = validation_scores(rows, ["a", "b"], predictions, Resampling(100))
    assert scores["loss"].value == pytest.approx(-(np.log(0.8) + np.log(0.4)) / 2)
    assert scores["accuracy"].value == 0.5


def test_autocast_is_taken_off_for_measuring_and_put_back() -> None:
    model = torch.nn.Linear(2, 2)
    plain = model.forward

    def wrapped(x: torch.Tensor) -> torch.Tensor:
        return plain(x) + 1

    model.forward = wrapped  # type: ignore[method-assign]
    zero = torch.zeros(1, 2)
    with without_autocast(model):
        assert torch.equal(model(zero), plain(zero))
    assert torch.equal(model(zero), plain(zero) + 1)


@pytest.fixture(scope="module")
def overshot(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose learning rate is far too high, so that its best checkpoint is not its last."""
    recipe = small(
        tmp_path_factory.mktemp("overshot"), "validation={every: 3, metric: loss}", "training.learning_rate=0.05"
    )
    return train(recipe, root=tmp_path_factory.mktemp("runs"), reporter=Silent())


@pytest.mark.slow
def test_the_adapter_is_that_of_the_best_checkpoint_bit_for_bit(overshot: RunDir) -> None:
    found = measurements(overshot)
    best = min(found, key=lambda line: float(line["eval_loss"]))
    manifest = overshot.read("manifest.json")
    assert [line["step"] for line in found] == [3, 6, 9, 12]
    assert manifest["best"] == {"step": best["step"], "metric": "loss", "value": round(best["eval_loss"], 6)}
    assert manifest["steps"] == 12 != best["step"]
    assert manifest["stopped_early"] is False
    kept = {path.name for path in overshot.checkpoints.iterdir()}
    assert {f"checkpoint-{best['step']}", "checkpoint-9", "checkpoint-12", "latest"} <= kept
    assert len(kept) == 4
    ours = weights(overshot.adapter)
    assert any("embed" in name for name in ours)
    assert equal(ours, weights(overshot.checkpoints / f"checkpoint-{best['step']}"))
    assert not equal(ours, weights(overshot.checkpoints / "checkpoint-12"))


@pytest.mark.slow
def test_measuring_more_often_leaves_the_training_curve_as_it_is(overshot: RunDir, tmp_path: Path) -> None:
    recipe = overshot.recipe()
    assert recipe.validation is not None
    often = recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"every": 1})})
    other = train(often, root=tmp_path, reporter=Silent())
    assert len(measurements(other)) == 12
    assert losses(other) == losses(overshot)
    assert [line for line in measurements(other) if line["step"] % 3 == 0] == measurements(overshot)


@pytest.mark.slow
@pytest.mark.parametrize("validated", [True, False])
def test_a_run_killed_after_its_last_step_within_an_epoch_takes_no_further_step(
    overshot: RunDir, tmp_path: Path, validated: bool
) -> None:
    if validated:
        run = RunDir(tmp_path / "run")
        shutil.copytree(overshot.path, run.path)
    else:
        run = train(small(tmp_path, "training.max_steps=4"), root=tmp_path / "runs", reporter=Silent())
    steps, ours, before, scores = (
        run.recipe().training["max_steps"],
        weights(run.adapter),
        lines(run),
        run.read("scores.json"),
    )
    run.update_manifest(status="running")  # as kill -9 leaves it while it is measured at the end
    shutil.rmtree(run.adapter)
    resume(run, reporter=Silent())
    assert run.read("manifest.json")["steps"] == steps
    assert lines(run) == before
    assert equal(weights(run.adapter), ours)
    assert run.read("scores.json") == scores


@pytest.mark.slow
def test_a_plateau_ends_after_patience_measurements_and_resuming_adds_none(tmp_path: Path) -> None:
    recipe = small(tmp_path, "validation={every: 2, patience: 2}", "training.learning_rate=0")
    run = train(recipe, root=tmp_path / "runs", reporter=Silent())
    assert [line["step"] for line in measurements(run)] == [2, 4, 6]  # the first, and two that are no better
    manifest = run.read("manifest.json")
    assert (manifest["steps"], manifest["stopped_early"], manifest["best"]["step"]) == (6, True, 2)
    ours = weights(run.adapter)
    run.update_manifest(status="interrupted")  # as if it had been killed while it was measured at the end
    shutil.rmtree(run.adapter)
    resume(run, reporter=Silent())
    assert run.read("manifest.json")["steps"] == 6
    assert run.read("manifest.json")["stopped_early"] is True
    assert len(measurements(run)) == 3
    assert equal(weights(run.adapter), ours)


@pytest.mark.slow
def test_a_resumed_run_goes_on_counting_its_patience(tmp_path: Path) -> None:
    recipe = small(tmp_path, "validation={every: 2, patience: 3}", "training.learning_rate=0")
    with pytest.raises(Interrupted, match="a signal after step 5"):
        train(recipe, root=tmp_path / "runs", reporter=Stopping(5))
    run = resume(RunDir((tmp_path / "runs" / "small" / "latest").resolve()), reporter=Silent())
    assert [line["step"] for line in measurements(run)] == [2, 4, 6, 8]
    assert run.read("manifest.json")["stopped_early"] is True


@pytest.mark.slow
def test_a_signal_in_the_last_step_stops_the_run_before_it_is_measured(tmp_path: Path) -> None:
    recipe = small(tmp_path, "validation={every: 3, metric: loss}", "training.max_steps=3")
    with pytest.raises(Interrupted, match="after the last step, 3"):
        train(recipe, root=tmp_path / "runs", reporter=Stopping(3))
    run = RunDir((tmp_path / "runs" / "small" / "latest").resolve())
    assert not (run.path / "scores.json").exists()
    assert [line["step"] for line in measurements(run)] == [3]
    before = lines(run)
    resume(run, reporter=Silent())
    assert (run.read("manifest.json")["steps"], lines(run)) == (3, before)


@pytest.mark.slow
def test_a_run_stopped_within_an_epoch_and_moved_resumes_to_the_same_result(tmp_path: Path) -> None:
    settings = ("validation={metric: loss, patience: 2}", "training.max_steps=-1", "training.num_train_epochs=3")
    settings += ("training.per_device_train_batch_size=9", "training.learning_rate=0.05")
    recipe = small(tmp_path, *settings)
    whole = train(recipe, root=tmp_path / "whole", reporter=Silent())
    with pytest.raises(Interrupted, match="a signal after step 9"):
        train(recipe, root=tmp_path / "cut", reporter=Stopping(9))
    moved = tmp_path / "moved"
    shutil.move((tmp_path / "cut" / "small" / "latest").resolve(), moved)
    run = resume(RunDir(moved), reporter=Silent())
    assert measurements(run) == measurements(whole)
    assert losses(run) == losses(whole)
    for name in ("best", "stopped_early", "steps"):
        assert run.read("manifest.json")[name] == whole.read("manifest.json")[name]
    assert equal(weights(run.adapter), weights(whole.adapter))
    assert run.read("scores.json") == whole.read("scores.json")
