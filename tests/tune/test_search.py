"""The search space: checked against the schema at once, and what it makes of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ift_peft.errors import Faults, RecipeError
from ift_peft.recipe import Recipe, dump_recipe, load_recipe, validate
from ift_peft.selection import Setting, Span
from ift_peft.tune.search import check_search, default_search, distributions, own_settings, with_settings, within
from ift_peft.yaml_source import YamlSource, parse_value
from tests.train.small import small, write_small


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return small(tmp_path, "validation.metric=loss")


@pytest.mark.parametrize(
    ("path", "setting", "message"),
    [
        ("adapter.rr", (4, 8), r"'rr' at tune\.search: adapter\.rr"),
        ("adaptr.r", (4, 8), r"'adaptr' at tune\.search: adaptr\.r[\s\S]*did you mean 'adapter'"),
        ("training.lerning_rate", (1, 2), r"'lerning_rate' at tune\.search[\s\S]*did you mean 'learning_rate'"),
        ("training.packing", (True, False), "packing"),
        ("training.seed", ("many", "few"), "training.seed to be int"),
        ("adapter.r", (0, 4), r"adapter\.r"),
        ("adapter.lora_dropout", Span(low=0.1, high=1.5), "less than 1"),
        ("adapter.r.x", (1, 2), "r is no section"),
        ("validation.size", (0.1, 0.2), r"leave the validation rows[\s\S]*validation\.size"),
        ("evaluation.seed", (1, 2), r"evaluation\.seed"),
        ("data.seed", (1, 2), r"the rows as they are[\s\S]*data\.seed"),
        ("data.max_train_rows", (20, 40), r"the rows as they are[\s\S]*data\.max_train_rows"),
        ("data.quality.near_duplicates", ("warn", "drop"), r"the rows as they are"),
    ],
)
def test_what_is_no_setting_of_a_recipe_is_refused_by_its_path(
    recipe: Recipe, path: str, setting: Setting, message: str
) -> None:
    with pytest.raises((RecipeError, Faults), match=message) as caught:
        check_search(recipe, {path: setting})
    assert caught.value.exit_code == 2


def test_settings_whose_trials_cannot_be_compared_are_refused_and_others_are_not(
    recipe: Recipe, tmp_path: Path
) -> None:
    bases: dict[str, Setting] = {"base.model": ("tiny", "other")}
    check_search(recipe, bases)  # the loss of classes is of each row, whatever its tokens
    answers = small(tmp_path, "data.labels=null", "validation={}")
    with pytest.raises(RecipeError, match=r"nats for each[\s\S]*base\.model"):
        check_search(answers, bases)
    lengths: dict[str, Setting] = {"training.max_length": (64, 128)}
    check_search(answers, lengths)
    with pytest.raises(RecipeError, match=r"data\.overlong=drop[\s\S]*training\.max_length"):
        check_search(small(tmp_path, "data.overlong=drop", "validation={}"), lengths)
    check_search(answers, {"data.instruction": ("a", "b"), "data.system": ("a", "b")})


def test_every_fault_of_a_search_is_told_once(recipe: Recipe) -> None:
    search: dict[str, Setting] = {"adapter.rr": (1, 2, 3), "base.quantization": ("nf4", "nf5"), "adapter.r": (4, 8)}
    with pytest.raises(Faults) as caught:
        check_search(recipe, search)
    assert [("'rr'" in str(fault), "nf5" in str(fault)) for fault in caught.value.faults] == [
        (True, False),
        (False, True),
    ]


def test_settings_go_where_their_path_says_and_into_sections_that_were_unset(recipe: Recipe) -> None:
    changed = with_settings(recipe, {"adapter.r": 8, "data.augment.synonyms": 0.1, "training.weight_decay": 0.1})
    assert changed.adapter.r == 8
    assert changed.data.augment is not None
    assert changed.data.augment.synonyms == 0.1
    assert changed.training == {**recipe.training, "weight_decay": 0.1}
    assert recipe.adapter.r == 4
    assert with_settings(recipe, {}) == recipe


def test_the_default_search_lies_around_the_recipe_and_holds_it(recipe: Recipe, tmp_path: Path) -> None:
    search = default_search(recipe)
    assert set(search) == {"training.learning_rate", "adapter.r"}  # max_steps leaves epochs without meaning
    rate = search["training.learning_rate"]
    assert isinstance(rate, Span)
    assert (rate.low, rate.high) == pytest.approx((2e-4, 2e-2))
    by_epochs = load_recipe(str(write_small(tmp_path)), ["training.max_steps=-1", "adapter.r=6"])
    search = default_search(by_epochs)
    assert search["training.num_train_epochs"] == Span(low=1, high=6, integer=True)  # SFTConfig's 3 epochs
    assert search["adapter.r"] == (4, 6, 8, 16, 32)
    check_search(by_epochs, search)
    assert within(own_settings(by_epochs, list(search)), distributions(search))


def test_own_settings_are_those_that_training_takes(recipe: Recipe) -> None:
    """Where the recipe leaves them unset, SFTConfig's own defaults are not always those it is trained with."""
    wanted = {
        "training.train_sampling_strategy": "group_by_length",
        "training.gradient_checkpointing": False,
        "training.activation_checkpointing": False,
        "training.max_length": 256,
        "training.bf16": False,
        "training.lr_scheduler_type": "linear",
        "training.num_train_epochs": 3.0,
        "training.learning_rate": 2e-3,
        "adapter.r": 4,
        "data.augment.synonyms": None,
    }
    assert own_settings(recipe, list(wanted), max_length=256) == wanted


@pytest.mark.parametrize(
    ("value", "setting", "inside"),
    [
        (2, Span(low=1, high=3, integer=True), True),
        (2.5, Span(low=1, high=3, integer=True), False),
        (4, Span(low=1, high=3, integer=True), False),
        (True, (1, 2), False),
        (None, Span(low=1, high=3), False),
        ("a", ("a", "b"), True),
    ],
)
def test_a_value_is_within_a_search_or_not(value: Any, setting: Setting, inside: bool) -> None:
    assert within({"x": value}, distributions({"x": setting})) is inside


def test_a_search_is_written_in_yaml_and_dumped_to_an_equal_one(tmp_path: Path) -> None:
    text = "training.learning_rate: {low: 1e-5, high: 1e-2, log}, training.num_train_epochs: {low: 1, high: 6, int}"
    recipe = small(tmp_path, f"tune.search={{{text}}}", "tune.minutes=5")
    assert recipe.tune is not None
    assert recipe.tune.search["training.num_train_epochs"] == Span(low=1, high=6, integer=True)
    assert recipe.tune.limits == {"minutes": 5}
    assert validate(YamlSource("again", parse_value(dump_recipe(recipe)))) == recipe
    for wrong in ("{low: 2, high: 1}", "[1]", "3", "{low: 0, high: 1, log}", "{low: 0.5, high: 2, int}", "{low: 1}"):
        with pytest.raises((RecipeError, Faults), match=r"tune\.search"):
            small(tmp_path, f"tune.search={{adapter.r: {wrong}}}")
