from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from ift_peft.data.render import Renderer
from ift_peft.data.row import ask
from ift_peft.errors import DataError
from ift_peft.explain.pieces import Kind, Piece, prompt_pieces
from ift_peft.model.tokenizer import TINY

INSTRUCTION = "请将以下文本分类为正面或负面。"


def renderer(template: str | None = None) -> Renderer:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    if template is not None:
        tokenizer.chat_template = template or None
    return Renderer(tokenizer)


def of_kind(pieces: list[Piece], kind: Kind) -> str:
    return "".join(piece.text for piece in pieces if piece.kind == kind)


@pytest.mark.parametrize(
    "text", ["屏幕三天就坏了。", "The room was incomprehensibly dirty!", "user\n<b> 𰻝𰻝面 🍜 很好", "为"]
)
@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("template", [None, ""])  # the tokenizer's own; User: … Assistant: …
def test_every_token_is_in_one_piece_of_its_kind(text: str, position: str, template: str | None) -> None:
    messages = ask(text, instruction=INSTRUCTION, system="user", position=position)  # type: ignore[arg-type]
    prompt, pieces = prompt_pieces(renderer(template), messages, text)
    assert [token for piece in pieces for token in range(piece.start, piece.end)] == list(range(len(prompt.ids)))
    assert "".join(piece.text for piece in pieces) == prompt.text
    assert of_kind(pieces, "text").strip() == text  # white space around it may be in its tokens
    assert of_kind(pieces, "instruction").replace("\n", "") == f"user{INSTRUCTION}"


def test_pieces_of_one_character_and_of_one_word_are_one() -> None:
    ids = renderer().tokenizer("𰻝", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    _, pieces = prompt_pieces(
        renderer(), ask("面𰻝面 unputdownable!", instruction="请", system=None), "面𰻝面 unputdownable!"
    )
    by_text = {piece.text: piece.end - piece.start for piece in pieces}
    assert by_text["𰻝"] == len(ids)
    assert by_text[" unputdownable"] > 1
    assert "!" in by_text


def test_a_chinese_word_is_one_piece() -> None:
    text = "这个产品很糟糕，我非常失望。"
    _, pieces = prompt_pieces(renderer(), ask(text, instruction="请分类。", system=None), text)
    own = [piece for piece in pieces if piece.kind == "text"]
    assert [piece.text for piece in own] == ["这个", "产品", "很", "糟糕", "，", "我", "非常", "失望", "。"]
    assert any(piece.end - piece.start > 1 for piece in own)


def test_a_template_that_changes_what_it_is_given_is_refused() -> None:
    shouting = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | upper }}<|end|>{% endfor %}"
    messages = ask("very good", instruction="Classify.", system=None)
    with pytest.raises(DataError, match="as they are"):
        prompt_pieces(renderer(shouting), messages, "very good")
