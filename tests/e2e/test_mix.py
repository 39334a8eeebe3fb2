"""A mix of tasks: each source measured, asked and answered as the task that it is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from ift_peft.adapters.merge import merge
from ift_peft.cli import app
from ift_peft.errors import IftPeftError, RunError
from ift_peft.evaluate.contrast import ACCURACY, PER_TOKEN, contrast
from ift_peft.evaluate.metrics import Resampling
from ift_peft.evaluate.run import evaluate_run
from ift_peft.infer.load import Question, held_out_rows, load_model, open_parts
from ift_peft.infer.predict import answer_all
from ift_peft.recipe import dump_recipe, load_recipe
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.train.run import train

pytestmark = pytest.mark.slow


def lines(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / name).read_text("utf-8").splitlines()]


def alone(run: RunDir, name: str, folder: Path) -> RunDir:
    """A copy of a mixed run whose recipe and held-out rows are those of one source, as if it had been the only one."""
    copy = RunDir(folder / name)
    shutil.copytree(run.path, copy.path)
    recipe = run.recipe()
    number = recipe.data.source_names.index(name)
    source = recipe.data.sources[number]
    evaluation = recipe.evaluation.model_copy(update={"metrics": source.metrics or ()})
    single = recipe.model_copy(update={"data": recipe.data.by_source()[number][0], "evaluation": evaluation})
    (copy.path / "recipe.yaml").write_text(dump_recipe(single), "utf-8")
    own = [{**row, "source": 0} for row in lines(run, "test.jsonl") if row.get("source", 0) == number]
    copy.write_lines("test.jsonl", own)
    return copy


@pytest.mark.parametrize("name", ["reviews", "qa"])
def test_a_source_scores_what_it_scores_as_the_only_task(mixed_run: RunDir, tmp_path: Path, name: str) -> None:
    stored = mixed_run.read("scores.json")["by_source"][name]
    again = evaluate_run(alone(mixed_run, name, tmp_path), data=None, reporter=Silent())
    assert again == {**stored, "gates": []}
    assert stored["rows"] > 1
    wanted = {"reviews": {"accuracy", "f1"}, "qa": {"loss", "exact_match", "f1"}}[name]
    assert wanted <= stored["adapter"].keys()


def test_all_rows_are_measured_by_the_likelihood_of_their_answers(mixed_run: RunDir) -> None:
    scores, predictions = mixed_run.read("scores.json"), lines(mixed_run, "predictions.jsonl")
    assert [line["row"] for line in predictions] == list(range(scores["rows"]))
    names, rows = mixed_run.recipe().data.source_names, lines(mixed_run, "test.jsonl")
    assert [line["source"] for line in predictions] == [names[row.get("source", 0)] for row in rows]
    assert [line["answer"] for line in predictions] == [row["messages"][-1]["content"] for row in rows]
    for who in ("base", "adapter"):
        found = [line.get("likelihood", line)[who] for line in predictions]
        loss = -sum(one["log_probability"] for one in found) / sum(one["tokens"] for one in found)
        assert scores[who]["loss"]["value"] == pytest.approx(loss, abs=1e-5)
        assert scores[who]["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert sum(own["rows"] for own in scores["by_source"].values()) == scores["rows"]


def test_each_source_is_answered_by_its_own_labels(mixed_run: RunDir) -> None:
    data = mixed_run.recipe().data
    for source, (part, _) in zip(data.source_names, data.by_source(), strict=True):
        own = [line for line in lines(mixed_run, "predictions.jsonl") if line["source"] == source]
        for line in own if part.label_words else ():
            assert tuple(line["adapter"]) == part.label_words
            assert sum(line["adapter"].values()) == pytest.approx(1, abs=1e-4)
        if not part.label_words:
            assert all("log_probability" in line["adapter"] and "likelihood" not in line for line in own)


def test_measuring_again_gives_the_stored_scores_and_other_rows_are_of_a_named_source(
    mixed_run: RunDir, tmp_path: Path
) -> None:
    stored = mixed_run.read("scores.json")
    assert evaluate_run(mixed_run, data=None, reporter=Silent()) == stored
    path = tmp_path / "more.jsonl"
    path.write_text('{"text": "A joy from start to finish.", "label": "positive"}\n', "utf-8")
    scores = evaluate_run(mixed_run, data=path, source="films", reporter=Silent())
    assert {name: own["rows"] for name, own in scores["by_source"].items()} == {"films": 1}
    with pytest.raises(RunError, match="'film'"):
        evaluate_run(mixed_run, data=path, source="film", reporter=Silent())


def test_predicting_as_a_source_is_what_was_measured_of_it(mixed_run: RunDir) -> None:
    parts = open_parts(mixed_run)
    model, _ = load_model(parts)
    rows, predictions = held_out_rows(parts).rows, lines(mixed_run, "predictions.jsonl")
    films = parts.as_source("films")
    assert films.labels == ("negative", "positive")
    own = [(row, line) for row, line in zip(rows, predictions, strict=True) if line["source"] == "films"]
    asked = [films.ask(row.text or "") for row, _ in own]
    assert [question.messages for question in asked] == [row.prompt for row, _ in own]
    for answer, (_, line) in zip(answer_all(model, films, asked, max_new_tokens=4), own, strict=True):
        assert answer.probabilities == pytest.approx(line["adapter"], abs=1e-4)
    (free,) = answer_all(model, parts.as_source("chat"), [Question(rows[0].prompt)], max_new_tokens=4)
    assert free.probabilities is None


def test_the_command_line_asks_as_a_source_and_says_how_else(mixed_run: RunDir) -> None:
    def predict(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["predict", str(mixed_run.path), *arguments])

    asked = predict("--source", "films", "A joy.")
    assert asked.exit_code == 0, asked.output
    assert "negative 0." in asked.stdout and "positive 0." in asked.stdout
    refused = predict("--source", "film", "A joy.")
    assert refused.exit_code == 5
    assert "reviews, topics, films" in refused.stderr
    free = predict("--max-new-tokens", "4", "好")
    assert "asked as reviews asks" in free.stderr and "--source reviews|topics|films" in free.stderr


def test_mixes_are_compared_as_a_whole_and_by_source(mixed_run: RunDir) -> None:
    scores = mixed_run.read("scores.json")
    found = {probe.name: probe for probe in contrast([mixed_run], Resampling(samples=200)).probes}
    assert found["held-out"].metric == PER_TOKEN
    assert found["held-out"].scores[0].estimate.value == pytest.approx(scores["adapter"]["loss"]["value"], abs=1e-5)
    for name, own in scores["by_source"].items():
        probe = found[f"held-out: {name}"]
        metric = "accuracy" if probe.metric == ACCURACY else "loss"
        assert probe.rows == own["rows"]
        assert probe.scores[0].estimate.value == pytest.approx(own["adapter"][metric]["value"], abs=1e-5)
    assert found["held-out: topics"].metric == ACCURACY


def test_a_mix_is_merged_by_its_logits(mixed_run: RunDir, tmp_path: Path) -> None:
    result = merge(open_parts(mixed_run), output=tmp_path / "merged", dtype="float32", reporter=Silent())
    assert result.max_logit_difference < 1e-3
    assert result.rows == 60 and result.same_labels is None


def test_the_card_says_what_each_source_scored_and_how_it_is_asked(mixed_run: RunDir) -> None:
    card = (mixed_run.adapter / "README.md").read_text("utf-8")
    accuracy = mixed_run.read("scores.json")["by_source"]["topics"]["adapter"]["accuracy"]["value"]
    (line,) = (line for line in card.splitlines() if line.startswith("| topics: accuracy |"))
    assert f"{accuracy:.3f}" in line
    assert "Texts of films were asked about as" in card and "one of: negative, positive." in card


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.unseen_instructions=[甲]", "no evaluation.unseen_instructions"),
        ("evaluation.perturbation={synonyms: 0.1}", "no evaluation.perturbation"),
        ("data.augment={synonyms: 0.1}", "augment only with labels"),
        ("evaluation.target={accuracy: 0.9}", "metrics that are measured: loss, perplexity"),
        ("evaluation.metrics=[pass_at_k]", "tests in every held-out row"),
        ("data.test=rows.jsonl", "test in each source"),
    ],
)
def test_what_only_one_task_can_be_asked_is_refused_before_training(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(IftPeftError, match=message):
        train(load_recipe("multitask", [override]), root=tmp_path / "runs", reporter=Silent())
    assert not (tmp_path / "runs").exists()
