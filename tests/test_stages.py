"""The section pipeline: the order of stages, what each inherits, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ift_peft.errors import Faults, RecipeError
from ift_peft.recipe import dump_recipe, load_recipe, stage_recipes, validate
from ift_peft.stages import fields_of, holes, in_order
from ift_peft.yaml_source import read_yaml

DIAMOND = """
base: {device: cpu}
data: {train: rows.jsonl, test: test.jsonl, instruction: Answer.}
training: {max_steps: 2, learning_rate: 1.0e-3}
evaluation: {forgetting: false}
pipeline:
  stages:
    last:
      data: {columns: {text: "{left} {right}"}, train: other.jsonl}
    left:
      data: {columns: {text: "{first}"}, instructions: [Say it in short., Shorter.]}
      training: {learning_rate: 2.0e-3}
    right:
      data: {columns: {text: "{first} {place}", answer: r}}
    first:
      data: {columns: {text: what}}
  document: "{what}: {last}"
  at_once: {data: {columns: {text: "{what} {place}"}}}
"""


@pytest.fixture
def diamond(tmp_path: Path) -> Path:
    for name in ("rows", "test", "other"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n", "utf-8")
    (tmp_path / "diamond.yaml").write_text(DIAMOND, "utf-8")
    return tmp_path / "diamond.yaml"


def test_stages_stand_after_those_whose_answers_they_take(diamond: Path) -> None:
    found = stage_recipes(load_recipe(str(diamond)))
    order = list(found)
    assert order[0] == "first" and order[3:] == ["last", "at_once"] and set(order[1:3]) == {"left", "right"}
    texts = [str(own.data.columns.text) for name, own in found.items() if name != "at_once"]
    assert fields_of(texts, found) == ("what", "place")


def test_a_stage_is_the_recipe_with_its_own_settings_over_it(diamond: Path) -> None:
    found = stage_recipes(load_recipe(str(diamond), ["pipeline.stages.right.adapter.r=3"]))
    left, right, last, whole = (found[name] for name in ("left", "right", "last", "at_once"))
    assert left.name == "diamond.left" and left.training == {"max_steps": 2, "learning_rate": 2e-3}
    assert left.data.instruction is None and left.data.instructions is not None
    assert right.data.instruction == "Answer." and right.training["learning_rate"] == 1e-3 and right.adapter.r == 3
    assert [own.data.columns.answer for own in (left, right, whole)] == ["left", "r", "{what}: {last}"]
    assert last.data.train == str(diamond.parent / "other.jsonl") and left.data.train == str(
        diamond.parent / "rows.jsonl"
    )
    assert all(own.pipeline is None and own.data.test == str(diamond.parent / "test.jsonl") for own in found.values())


def test_a_recorded_pipeline_has_the_same_stages(diamond: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(diamond))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), "utf-8")
    again = stage_recipes(validate(read_yaml(tmp_path / "recipe.yaml")))
    assert {name: dump_recipe(own) for name, own in again.items()} == {
        name: dump_recipe(own) for name, own in stage_recipes(recipe).items()
    }


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("pipeline.stages.first.data.columns.text='{last}'", "first → .*last|last → .*first"),
        ("pipeline.document='{last} {nothing}'", "nothing at override"),
        ("pipeline.document='{what}'", "the answer of a stage in document"),
        ("pipeline.stages.left.training.learning_rat=1", "did you mean 'learning_rate'"),
        ("pipeline.stages.left.base.model=x", "no base in left"),
        ("pipeline.at_once.data.columns.text='{first}'", "asked what the stages are asked"),
        ("pipeline.metrics=[pass_at_k]", "other than pass_at_k"),
        ("data.test=null", "no data.test"),
        ("tune.trials=2", "tune in the recipe of one task|tune"),
        ("pipeline.metrics=[]", "metrics, other"),
        ("pipeline.stages.frist.training.max_steps=2", "stage frist in the prompt .*\n.*\n.*did you mean 'first'"),
        ("pipeline.stages.left.data.sources=[{train: rows.jsonl}]", "stage left on one source"),
        ("pipeline.stages.At.data.columns.text=what", "match pattern"),
    ],
)
def test_what_makes_no_pipeline_is_refused(diamond: Path, override: str, told: str) -> None:
    with pytest.raises((RecipeError, Faults), match=told):
        load_recipe(str(diamond), [override])


def test_what_a_stage_sets_as_one_value_is_not_mixed_with_the_common_one(diamond: Path) -> None:
    own = ("data.labels={0: no, 1: yes}", "evaluation.target.accuracy=0.5", "adapter.rank_pattern={q_proj: 2}")
    stage = "pipeline.stages.left"
    found = stage_recipes(
        load_recipe(
            str(diamond),
            [
                *own,
                f"{stage}.data.labels={{2: red, 3: blue}}",
                f"{stage}.evaluation.target={{}}",
                f"{stage}.adapter.rank_pattern={{v_proj: 4}}",
                "pipeline.at_once.data.labels=null",
                "pipeline.at_once.evaluation.target={}",
            ],
        )
    )
    assert found["left"].data.label_words == ("red", "blue") and found["left"].evaluation.target == {}
    assert found["left"].adapter.rank_pattern == {"v_proj": 4}
    assert found["first"].data.label_words == ("no", "yes") and found["first"].evaluation.target == {"accuracy": 0.5}
    assert found["first"].data.columns.label == "first" and found["first"].data.columns.answer is None


def test_faults_of_several_stages_are_told_together_with_their_lines(diamond: Path) -> None:
    diamond.write_text(DIAMOND.replace("learning_rate: 2.0e-3", "learning_rat: 1").replace("text: what", "txt: what"))
    with pytest.raises(Faults) as told:
        load_recipe(str(diamond))
    text = str(told.value)
    assert "'learning_rat' at" in text and "diamond.yaml:12" in text  # the line in the stage, not in the section above
    assert "'txt' at" in text and "diamond.yaml:16" in text


def test_order_of_a_ring_is_an_error_and_holes_are_told_once() -> None:
    assert holes("{a} {b} {a}") == ("a", "b") and holes("column") == ("column",)
    assert in_order({"b": "{a}", "a": "x"}) == ["a", "b"]
    with pytest.raises(ValueError, match="→"):
        in_order({"a": "{b}", "b": "{a}"})
