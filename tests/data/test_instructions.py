from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ift_peft.data.instructions import Asker, ask_held_out, askers, split_pool, unseen_pool
from ift_peft.data.row import Row, ask, language_of
from ift_peft.data.rows import held_out_rows, read_rows_of
from ift_peft.errors import DataError, RecipeError
from ift_peft.recipe import load_recipe
from ift_peft.sections import Data, Instructions, flat

POOL = ("甲：{text}", "乙", "{text}\n丙？（{labels}）", "丁", "戊")


def data(**settings: object) -> Data:
    return Data.model_validate({"train": "x.jsonl", "labels": ["负面", "正面"], **settings})


def row(text: str, number: int = 1) -> Row:
    messages = ({"role": "user", "content": text}, {"role": "assistant", "content": "正面"})
    return Row(messages, f"x.jsonl:{number}", label="正面", text=text)


@pytest.mark.parametrize(
    ("instruction", "position", "content"),
    [
        (None, "before", "好 {labels}"),
        ("分类。", "before", "分类。\n好 {labels}"),
        ("分类。", "after", "好 {labels}\n分类。"),
        ("读“{text}”，选{labels}。", "after", "读“好 {labels}”，选负面、正面。"),
        ("One of {labels}: {text}", "before", "One of 负面, 正面: 好 {labels}"),
    ],
)
def test_a_text_is_asked_about_before_after_or_inside_the_instruction(
    instruction: str | None, position: str, content: str
) -> None:
    (message,) = ask(
        "好 {labels}",
        instruction=instruction,
        system=None,
        labels=("负面", "正面"),
        position=position,  # type: ignore[arg-type]
    )
    assert message == {"role": "user", "content": content}


@given(st.text(min_size=1), st.integers(0, 5), st.integers(0, 9))
def test_a_draw_is_a_function_of_seed_and_key_and_in_the_trained_pool(text: str, seed: int, variant: int) -> None:
    section = {"pool": POOL, "hold_out": 2, "seed": seed}
    one, other = (Asker(data(instructions=section)) for _ in range(2))
    drawn = one.instruction(text, key=f"{variant}:w")
    assert drawn == other.instruction(text, key=f"{variant}:w")
    trained, held = split_pool(Instructions(pool=POOL, hold_out=2, seed=seed))
    assert drawn in trained
    assert set(trained).isdisjoint(held)
    assert set(trained) | set(held) == set(POOL)


def test_every_trained_phrasing_is_drawn_over_rows_and_epochs() -> None:
    asker = Asker(data(instructions=list(POOL)))
    assert asker.varies_by_epoch
    drawn = [asker.instruction("好", key=f"{epoch}:x.jsonl:{line}") for epoch in range(3) for line in range(40)]
    assert set(drawn) == set(POOL)
    first, second = drawn[:40], drawn[40:80]
    assert first != second


def test_a_pool_by_language_asks_each_text_in_its_own() -> None:
    asker = Asker(data(instructions={"zh": ["请分类。"], "en": ["Classify."]}))
    assert asker.instruction("房间很大", key="a") == "请分类。"
    assert asker.instruction("The room was large", key="a") == "Classify."
    with pytest.raises(DataError, match="phrasings for 'en'"):
        Asker(data(instructions={"zh": ["请分类。"]})).instruction("The room", key="a")


def test_languages_are_told_by_their_letters() -> None:
    assert [language_of(text) for text in ("好", "iPhone 的屏幕真好", "The 茶 was good", "123", "")] == [
        "zh",
        "zh",
        "en",
        "en",
        "en",
    ]


def test_being_asked_anew_keeps_what_precedes_the_question() -> None:
    earlier = ({"role": "user", "content": "在吗"}, {"role": "assistant", "content": "在"})
    conversation = Row((*earlier, *row("好").messages), "x:1", label="正面", text="好")
    again = Asker(data(instructions=list(POOL))).asked(conversation, "分类。")
    assert again.messages == (*earlier, {"role": "user", "content": "分类。\n好"}, conversation.messages[-1])
    with pytest.raises(DataError, match="whole conversation at x:1"):
        Asker(data(instructions=list(POOL))).asked(Row(conversation.messages, "x:1"), "分类。")


def test_held_out_rows_are_asked_in_trained_phrasings_only() -> None:
    section = data(instructions={"pool": list(POOL), "hold_out": 3})
    trained = flat(split_pool(section.instructions)[0]) if section.instructions else ()
    rows = ask_held_out([row("好", number) for number in range(60)], askers(section))
    prompts = {asked.prompt[0]["content"] for asked in rows}
    assert prompts == {
        ask("好", instruction=phrasing, system=None, labels=section.label_words)[0]["content"] for phrasing in trained
    }


def test_a_phrasing_that_is_trained_on_cannot_be_called_unseen() -> None:
    section = data(instructions=list(POOL))
    with pytest.raises(RecipeError, match="'乙' in both"):
        unseen_pool(section, ("乙", "己"))
    assert unseen_pool(section, ("己",)) == ("己",)
    assert unseen_pool(section, None) is None
    with pytest.raises(RecipeError, match="'分类。' in both"):
        unseen_pool(data(instruction="分类。"), ("分类。",))
    held = unseen_pool(data(instructions={"pool": list(POOL), "hold_out": 2}), None)
    assert held is not None and len(flat(held)) == 2


def test_holding_out_every_phrasing_is_refused() -> None:
    with pytest.raises(RecipeError, match="phrasings left to train on"):
        split_pool(Instructions(pool=POOL, hold_out=5))
    with pytest.raises(RecipeError, match="none for en with hold_out=1"):
        split_pool(Instructions(pool={"zh": ("甲", "乙"), "en": ("one",)}, hold_out=1))


def test_as_many_phrasings_are_held_out_of_each_language() -> None:
    pool = {"zh": ("甲", "乙", "丙"), "en": ("one", "two")}
    trained, held = split_pool(Instructions.model_validate({"pool": pool, "hold_out": 1}))
    assert isinstance(trained, dict) and isinstance(held, dict)
    assert (len(held["zh"]), len(held["en"])) == (1, 1)
    assert len(flat(trained)) == 3


def test_unseen_phrasings_are_named_in_one_place() -> None:
    with pytest.raises(RecipeError, match="hold_out and unseen_instructions"):
        unseen_pool(data(instructions={"pool": list(POOL), "hold_out": 2}), ("己",))


def test_one_phrasing_for_each_language_does_not_vary_by_epoch() -> None:
    assert not Asker(data(instructions={"zh": ["甲"], "en": ["one"]})).varies_by_epoch
    assert Asker(data(instructions={"zh": ["甲", "乙"], "en": ["one"]})).varies_by_epoch


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": None, "instruction": "选{labels}。"}, "data.labels to be set where an instruction has"),
        ({"labels": None, "augment": {"synonyms": 0.1}}, "augment only with labels"),
        ({"train": None, "sources": [{"train": "a", "labels": ["neg", "pos"]}]}, "the same classes in every source"),
        ({"instructions": ["甲"], "instruction": "乙"}, "either instruction or instructions"),
        ({"streaming": True}, "data.test to be set where rows are streamed"),
        ({"instructions": []}, "phrasings that are each listed once"),
    ],
)
def test_what_does_not_fit_together_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(**settings)


def test_held_out_rows_beside_sources_are_asked_as_data_says_else_as_the_first_source(tmp_path: Path) -> None:
    for name in ("a", "b", "test"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}好", "label": "正面"}}\n', "utf-8")
    sources = [{"train": str(tmp_path / "a.jsonl"), "instruction": "甲。"}, {"train": str(tmp_path / "b.jsonl")}]
    settings: dict[str, object] = {"train": None, "sources": sources, "test": str(tmp_path / "test.jsonl")}
    cases = ((data(**settings), "甲。\ntest好"), (data(**settings, instruction="乙。"), "乙。\ntest好"))
    for section, expected in cases:
        (row,) = ask_held_out(held_out_rows(section), askers(section))
        assert row.prompt[-1]["content"] == expected
        asker = askers(section)[row.source]
        assert asker.asked(row, asker.instruction("x", key="k")) == row
        (new,) = ask_held_out(read_rows_of(section, str(tmp_path / "test.jsonl")), askers(section))
        assert new.prompt == row.prompt


def test_a_pool_is_read_from_a_file_and_recorded(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("甲\n\n乙\n", "utf-8")
    (tmp_path / "pool.yaml").write_text("zh: [甲]\nen: [one]\n", "utf-8")
    (tmp_path / "mine.yaml").write_text(
        "data: {train: a.jsonl, instructions: lines.txt}\nevaluation: {unseen_instructions: pool.yaml}\n", "utf-8"
    )
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert recipe.data.instructions == Instructions(pool=("甲", "乙"))
    assert recipe.evaluation.unseen_instructions == {"zh": ("甲",), "en": ("one",)}
    (tmp_path / "lines.txt").unlink()
    with pytest.raises(RecipeError, match=r"(?s)instructions to be a list, or a file.*lines\.txt"):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_a_recipe_extends_another_and_changes_what_it_names(tmp_path: Path) -> None:
    diverse, plain = load_recipe("sentiment-diverse"), load_recipe("sentiment")
    assert diverse.data.instructions is not None
    assert len(flat(diverse.data.instructions.pool)) >= 12
    assert plain.evaluation.unseen_instructions is not None
    assert len(flat(plain.evaluation.unseen_instructions)) >= 6
    assert unseen_pool(diverse.data, diverse.evaluation.unseen_instructions)
    assert (diverse.training, diverse.base, diverse.evaluation) == (plain.training, plain.base, plain.evaluation)
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n", "utf-8")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n", "utf-8")
    with pytest.raises(RecipeError, match="extends none"):
        load_recipe(str(tmp_path / "a.yaml"))
