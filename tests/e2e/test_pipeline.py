"""A pipeline trained over the built-in base: what is trained once, what goes from stage to stage, what is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ift_peft.cli import app
from ift_peft.errors import DataError, Faults, RecipeError, RunError
from ift_peft.evaluate.pipeline import held_out_requests
from ift_peft.infer.pipeline import Chain, Stage, answer_stage, open_chain, walk
from ift_peft.infer.predict import answer_all
from ift_peft.recipe import Recipe, load_recipe, require_one_task, stage_recipes
from ift_peft.reporter import Silent
from ift_peft.run_dir import ANY, RunDir, open_run
from ift_peft.train.once import earlier_runs, prepare_parts, unfinished
from ift_peft.train.pipeline import train_pipeline
from ift_peft.train.run import train

pytestmark = pytest.mark.slow
FEW = (
    "base.device=cpu",
    "base.quantization=none",
    "data.max_test_rows=6",
    "training.max_steps=3",
    "training.per_device_train_batch_size=8",
    "evaluation.max_new_tokens=12",
    "evaluation.bootstrap_samples=100",
)
MOODED = (  # a stage with labels between the others
    "pipeline.stages.language={data: {columns: {text: '{topic}', label: language}, labels: [zh, en], "
    "instruction: 'Which language?'}, evaluation: {metrics: []}}",
    "pipeline.stages.content.data.columns.text='{topic} {language} {outline}'",
)


class Told(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def recipe(folder: Path, *overrides: str) -> Recipe:
    """The recipe article with the language of each row as one more column."""
    folder.mkdir(parents=True, exist_ok=True)
    shipped = load_recipe("article")
    files = {"train": shipped.data.train, "test": shipped.data.test}
    for name, path in files.items():
        rows = [json.loads(line) for line in Path(str(path)).read_text("utf-8").splitlines()]
        labelled = [{**row, "language": "en" if row["request"].isascii() else "zh"} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled), "utf-8")
    own = tuple(f"data.{name}={folder / name}.jsonl" for name in files)
    return load_recipe("article", (*FEW, *own, *MOODED, *overrides))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline") / "runs"


@pytest.fixture(scope="module")
def run(root: Path) -> RunDir:
    return train_pipeline(recipe(root.parent / "rows"), root=root, reporter=Silent())


def test_every_stage_is_a_run_of_its_own_and_the_pipeline_is_measured(run: RunDir) -> None:
    stages = run.parts
    assert list(stages)[-1] == "at_once" and {"topic", "language", "outline", "content"} < stages.keys()
    assert all(
        own.status == "succeeded" and (own.adapter / "adapter_model.safetensors").is_file() for own in stages.values()
    )
    scores = run.read("scores.json")
    assert scores["rows"] == 6 and set(scores["stages"]) == stages.keys() - {"at_once"}
    assert "accuracy" in scores["stages"]["language"]["piped"] and "rouge1" in scores["stages"]["content"]["piped"]
    topic = scores["stages"]["topic"]  # takes nothing that a stage has written
    assert topic["given"] == topic["piped"] and topic["change"]["chrf"]["value"] == 0
    for change in scores["document"]["change"].values():
        assert change["low"] <= change["value"] <= change["high"]
    assert "<html" in (run.path / "report.html").read_text("utf-8")


def test_what_a_stage_is_asked_holds_what_the_others_answered(run: RunDir) -> None:
    chain, _ = open_chain(run)
    request = chain.request("写一篇短文，谈谈早春的颜色。")
    ((values, answers),) = walk(chain, [request])
    assert {name: answer.text for name, answer in answers.items()} == {name: values[name] for name in answers}
    outline = next(stage for stage in chain.stages if stage.name == "outline")
    alone = answer_all(
        outline.member.activate(), outline.parts, [outline.parts.ask(values["topic"])], max_new_tokens=12
    )
    assert next(iter(alone)).text == values["outline"]
    assert outline.parts.ask(values["topic"]).messages[-1]["content"].endswith(values["topic"])
    content = next(stage for stage in chain.stages if stage.name == "content")
    assert content.text == "{topic} {language} {outline}" and values["language"] in ("zh", "en")


def test_a_pipeline_of_many_requests_answers_as_one_at_a_time(run: RunDir) -> None:
    chain, _ = open_chain(run)
    requests = [chain.request(text) for text in ("请说说松鼠的家。", "How do you keep a study clean?", "木雕")]
    together = [values for values, _ in walk(chain, requests)]
    assert together == [walk(chain, [request])[0][0] for request in requests]


def test_documents_and_predictions_are_those_of_the_chain(run: RunDir) -> None:
    lines = run.read_lines("predictions.jsonl")
    chain, _ = open_chain(run, at_once=True)
    assert chain.at_once is not None
    values, _ = walk(chain, [lines[0]["request"]])[0]
    assert lines[0]["pipeline"] == {stage.name: values[stage.name] for stage in chain.stages}
    assert lines[0]["document"] == "\n".join(values[name] for name in ("topic", "outline", "content"))
    assert lines[0]["at_once"] == answer_stage(chain.at_once, [lines[0]["request"]])[0].text


def test_only_a_stage_that_changed_is_trained_again(run: RunDir, root: Path) -> None:
    told = Told()
    again = train_pipeline(
        recipe(root.parent / "rows", "pipeline.stages.outline.training.max_steps=2"), root=root, reporter=told
    )
    before, after = run.parts, again.parts
    assert {name for name in before if before[name] != after[name]} == {"outline"}
    assert sum("trained before" in note for note in told.notes) == 4


def test_only_a_run_on_the_same_rows_is_taken_for_a_stage(run: RunDir, root: Path, tmp_path: Path) -> None:
    stages = stage_recipes(recipe(root.parent / "rows"))
    before = prepare_parts(stages, Silent())
    assert {name: earlier_runs(part, root)[0] for name, part in before.items()} == run.parts
    path = Path(str(stages["topic"].data.train))
    kept = path.read_text("utf-8")
    first, rest = kept.split("\n", 1)
    try:
        path.write_text(json.dumps({**json.loads(first), "outline": "1. other words"}) + "\n" + rest, "utf-8")
        after = prepare_parts(stages, Silent())
    finally:
        path.write_text(kept, "utf-8")
    found = {name for name, part in after.items() if earlier_runs(part, root)}
    assert found == {"topic", "language"}  # the outline is in the rows of all others


def test_an_interrupted_pipeline_goes_on_where_it_was(run: RunDir, root: Path, tmp_path: Path) -> None:
    copied = tmp_path / "runs"
    shutil.copytree(root, copied, symlinks=True)
    stopped = RunDir(copied / run.path.relative_to(root))
    stages = dict(list(stopped.read("manifest.json")["parts"].items())[:2])
    stopped.update_manifest(status="interrupted", parts=stages)
    (stopped.path / "scores.json").unlink()
    with pytest.raises(RunError, match="succeeded"):
        open_run(stopped.path, kinds=ANY)
    told = Told()
    into = unfinished(open_run(stopped.path, finished=False, kinds=ANY))
    finished = train_pipeline(into.recipe(), root=copied, reporter=told, into=into)
    assert finished.path == stopped.path and finished.status == "succeeded"
    assert finished.read("scores.json") == run.read("scores.json")
    assert sum("trained before" in note for note in told.notes) == 5
    with pytest.raises(RunError, match="has succeeded"):
        unfinished(finished)


def test_a_column_that_is_not_what_its_stage_answers_is_refused(tmp_path: Path) -> None:
    """The content would be trained on codes and asked with words."""
    coded = "pipeline.stages.language.data.labels={zh: Chinese, en: English}"
    with pytest.raises(Faults, match="in the column 'language', which other stages are trained on") as told:
        held_out_requests(recipe(tmp_path / "rows", coded))
    assert "'zh', and the answer 'Chinese'" in str(told.value) or "'en', and the answer 'English'" in str(told.value)
    assert len(held_out_requests(recipe(tmp_path / "rows"))) == 6


def test_numbers_are_fields_as_in_training(tmp_path: Path) -> None:
    numbered = ("pipeline.stages.topic.data.columns.text='{request} {year}'", "pipeline.at_once=null")
    one = recipe(tmp_path / "rows", *numbered)
    for name in ("train", "test"):
        path = tmp_path / "rows" / f"{name}.jsonl"
        rows = [{**json.loads(line), "year": 2000} for line in path.read_text("utf-8").splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert held_out_requests(one)[0][0]["year"] == "2000"
    assert Chain((Stage("topic", None, "{request} {year}"),), None, "{topic}").request({"request": "a", "year": 7}) == {  # type: ignore[arg-type]
        "request": "a",
        "year": "7",
    }


def test_what_is_for_one_task_says_so_and_check_looks_at_every_part(tmp_path: Path) -> None:
    one = recipe(tmp_path / "rows")
    for refused in (lambda: train(one, root=tmp_path, reporter=Silent()), lambda: require_one_task(one, by="a search")):
        with pytest.raises(RecipeError, match="one task"):
            refused()
    report = tmp_path / "report.json"
    files = [f"data.{name}={tmp_path / 'rows' / name}.jsonl" for name in ("train", "test")]
    done = CliRunner().invoke(app, ["check", "article", *files, "--json", str(report)])
    assert done.exit_code == 0, done.output
    parts = json.loads(report.read_text("utf-8"))["parts"]
    names = ("topic", "outline", "content", "at_once")
    assert [part["recipe"] for part in parts] == [f"article.{name}" for name in names]


def test_faults_of_all_stages_are_told_before_anything_is_trained(tmp_path: Path) -> None:
    broken = (
        "pipeline.stages.topic.evaluation.target.accuracy=0.5",
        "pipeline.stages.content.adapter.target_modules=[nowhere]",
    )
    with pytest.raises(Exception, match="stage topic") as told:
        train_pipeline(recipe(tmp_path / "rows", *broken), root=tmp_path / "runs", reporter=Silent())
    assert "stage content" in str(told.value) and "nowhere" in str(told.value)
    assert not (tmp_path / "runs").exists()


def test_what_takes_one_adapter_refuses_a_pipeline(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="ift pipeline"):
        open_run(run.path)
    with pytest.raises(RecipeError, match="one task"):
        train(run.recipe(), root=tmp_path, reporter=Silent())
    with pytest.raises(RunError, match="one adapter"):
        open_run(run.parts["topic"].path, kinds=("pipeline",))


def test_a_request_without_its_fields_is_refused(run: RunDir) -> None:
    chain, _ = open_chain(run)
    assert chain.fields == ("request",) and chain.request({"request": "a", "other": 1}) == {"request": "a"}
    for empty in ("", {"text": "a"}, {"request": ["a"]}):
        with pytest.raises(DataError, match="request"):
            chain.request(empty)


def test_the_command_shows_every_intermediate_answer(run: RunDir, tmp_path: Path) -> None:
    asked = tmp_path / "requests.jsonl"
    asked.write_text('{"request": "请说说竹编要分几步做。"}\n', "utf-8")
    done = CliRunner().invoke(app, ["pipeline", str(run.path), "--input", str(asked), "--at-once"])
    assert done.exit_code == 0, done.output
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    chain, _ = open_chain(run)
    values, _ = walk(chain, [line["request"]])[0]
    assert {name: stage["answer"] for name, stage in line["stages"].items()} == {
        stage.name: values[stage.name] for stage in chain.stages
    }
    assert "answer" in line["at_once"] and list(line["stages"]["language"]["probabilities"]) == ["zh", "en"]
    shown = CliRunner().invoke(app, ["pipeline", str(run.path), line["request"]["request"]])
    assert all(f"{name}\n{values[name]}\n" in shown.stdout for name in ("topic", "language", "outline"))


def test_a_small_pretrained_llama_goes_through_a_pipeline(stories: str, tmp_path: Path) -> None:
    run = train_pipeline(
        recipe(
            tmp_path / "rows",
            f"base.model={stories}",
            "training.max_length=512",
            "data.overlong=drop",
            "data.max_train_rows=16",
            "data.max_test_rows=3",
            "pipeline.at_once=null",
        ),
        root=tmp_path / "runs",
        reporter=Silent(),
    )
    scores = run.read("scores.json")
    assert run.status == "succeeded" and scores["rows"] == 3
    assert "at_once" not in scores["document"] and "change" not in scores["document"]
