from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from ift_peft.data.fit import fit_rows
from ift_peft.data.render import IGNORE, Renderer
from ift_peft.data.row import Row, ask
from ift_peft.errors import DataError, Faults
from ift_peft.model.tokenizer import TINY

LONG = "这家店的面很好吃，服务也周到，" * 40


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(TINY))


def row(text: str, answer: str = "正面", *, instruction: str = "请分类。", number: int = 1) -> Row:
    prompt = ask(text, instruction=instruction, system=None)
    return Row((*prompt, {"role": "assistant", "content": answer}), f"rows.jsonl:{number}", answer, text)


@pytest.mark.parametrize("instruction", ["请分类。", "文本：{text}。请分类。"])
def test_an_overlong_text_is_cut_at_its_end_and_everything_else_stays(renderer: Renderer, instruction: str) -> None:
    whole = row(LONG, instruction=instruction)
    fitted = fit_rows([whole], renderer, max_length=60, overlong="truncate")
    (ids,), (cut,) = fitted.rendered, fitted.rows
    assert fitted.fit.truncated == 1
    assert 55 <= len(ids.input_ids) <= 60
    assert [label for label in ids.labels if label != IGNORE] == [
        label for label in renderer.render([whole.messages])[0].labels if label != IGNORE
    ]
    assert cut.text is not None
    assert LONG.startswith(cut.text)
    assert cut.messages[0]["content"] == ask(cut.text, instruction=instruction, system=None)[0]["content"]


def test_a_row_of_exactly_the_length_is_left_alone(renderer: Renderer) -> None:
    length = len(renderer.render([row("好").messages])[0].input_ids)
    fitted = fit_rows([row("好")], renderer, max_length=length, overlong="error")
    assert (fitted.fit.truncated, fitted.fit.dropped) == (0, 0)
    assert fitted.rows == [row("好")]


def test_dropped_rows_are_counted_and_dropping_all_is_an_error(renderer: Renderer) -> None:
    fitted = fit_rows([row("好"), row(LONG, number=2)], renderer, max_length=60, overlong="drop")
    assert fitted.fit.dropped == 1
    assert [kept.where for kept in fitted.rows] == ["rows.jsonl:1"]
    with pytest.raises(DataError, match="all were dropped"):
        fit_rows([row(LONG)], renderer, max_length=60, overlong="drop")


def test_rows_whose_answer_cannot_fit_are_all_named(renderer: Renderer) -> None:
    rows = [row("好", LONG, number=1), row("好"), row("好", LONG, number=3)]
    with pytest.raises(Faults) as caught:
        fit_rows(rows, renderer, max_length=60, overlong="truncate")
    assert "rows.jsonl:1" in str(caught.value)
    assert "rows.jsonl:3" in str(caught.value)
    assert len(caught.value.faults) == 2


def test_an_error_says_which_length_would_do(renderer: Renderer) -> None:
    length = len(renderer.render([row(LONG).messages])[0].input_ids)
    with pytest.raises(DataError, match=f"training.max_length to {length}"):
        fit_rows([row(LONG)], renderer, max_length=60, overlong="error")
    assert fit_rows([row(LONG)], renderer, max_length=length, overlong="error").fit.truncated == 0


def test_a_row_that_the_template_refuses_is_named(renderer: Renderer) -> None:
    with pytest.raises(DataError, match="special token") as caught:
        fit_rows([row("好"), row("好", "正面<|end|>", number=2)], renderer, max_length=60, overlong="truncate")
    assert "at rows.jsonl:2" in str(caught.value)


def test_a_text_is_cut_and_never_a_turn_before_its_question(renderer: Renderer) -> None:
    earlier = ({"role": "user", "content": "从前有座山" * 6}, {"role": "assistant", "content": "嗯"})
    text = "短问题" * 8
    whole = Row((*earlier, {"role": "user", "content": text}, {"role": "assistant", "content": "好"}), "x", text=text)
    length = len(renderer.render([whole.messages])[0].input_ids)
    (cut,) = fit_rows([whole], renderer, max_length=length - 5, overlong="truncate").rows
    assert cut.messages[:2] == earlier
    assert cut.text is not None
    assert text.startswith(cut.text)
    assert cut.messages[2]["content"] == cut.text
