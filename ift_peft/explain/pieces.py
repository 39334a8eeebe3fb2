"""A prompt in readable pieces: which tokens make up which word, and whether it is template, instruction or text."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import rjieba

from ift_peft.data.answer_spans import Span
from ift_peft.data.render import Prompt, TokenRenderer
from ift_peft.data.row import Message
from ift_peft.errors import DataError

Kind = Literal["template", "instruction", "text"]
_HAN = re.compile("[\u3400-\u9fff]")
_MARK = "\ue000"  # private use: no template knows it


@dataclass(frozen=True)
class Piece:
    """Tokens `start` to `end` (exclusive) of a prompt, shown as `text`."""

    text: str
    kind: Kind
    start: int
    end: int


def prompt_pieces(renderer: TokenRenderer, messages: Sequence[Message], text: str | None) -> tuple[Prompt, list[Piece]]:
    """The prompt of `messages` and its pieces, in order and without gaps: every token is in exactly one.

    `text` is the part of the last message that is asked about; what else the messages hold is instruction, and what
    the chat template puts around them is template. Tokens that share a character, and those of one word, are one
    piece; words of Chinese are those that jieba finds, of scripts without spaces otherwise the tokens. Raises
    `DataError` where the template does not put messages in as they are.
    """
    (prompt,) = renderer.aligned([messages])
    contents = _contents(renderer, messages, prompt.text)
    start, end = contents[-1]
    asked = (end, end) if text is None else _inside(prompt.text, text.strip(), start, end)
    words = _word_starts(prompt.text)
    pieces: list[Piece] = []
    first, kind = 0, _kind(prompt.offsets[0], contents, asked)
    for index in range(1, len(prompt.ids) + 1):
        after = _kind(prompt.offsets[index], contents, asked) if index < len(prompt.ids) else None
        if after == kind and _joined(prompt, index, words):
            continue
        covered = prompt.offsets[first:index]
        shown = prompt.text[min(s for s, _ in covered) : max(e for _, e in covered)]
        pieces.append(Piece(shown, kind, first, index))
        if after is not None:
            first, kind = index, after
    return prompt, pieces


def _contents(renderer: TokenRenderer, messages: Sequence[Message], text: str) -> list[Span]:
    """The characters of each message in the prompt's text: what is not the same when other messages are put in."""
    (marked,) = renderer.aligned([[{**message, "content": _MARK} for message in messages]])
    pattern = "(.*?)".join(map(re.escape, marked.text.split(_MARK)))
    found = re.fullmatch(pattern, text, re.DOTALL)
    if found is None or len(found.groups()) != len(messages):
        raise _unlike(text)
    return [found.span(number) for number in range(1, len(messages) + 1)]


def _inside(whole: str, part: str, start: int, end: int) -> Span:
    """Where `part` lies in `whole[start:end]`: at its end or beginning, where an instruction precedes or follows it."""
    content = whole[start:end]
    if content.endswith(part):
        return (end - len(part), end)
    at = 0 if content.startswith(part) else content.rfind(part)
    if at < 0:
        raise _unlike(content)
    return (start + at, start + at + len(part))


def _unlike(found: str) -> DataError:
    return DataError(
        expected="a chat template that puts the messages in one after another, as they are",
        found=repr(found[:80]),
        fix="correct the template: of its own tokens and those of the text nothing can be told apart",
    )


def _kind(span: Span, contents: Sequence[Span], asked: Span) -> Kind:
    if _overlap(span, asked):
        return "text"
    return "instruction" if any(_overlap(span, content) for content in contents) else "template"


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _joined(prompt: Prompt, index: int, words: frozenset[int]) -> bool:
    """Whether token `index` continues the piece of the token before it."""
    (start, end), (next_start, next_end) = prompt.offsets[index - 1], prompt.offsets[index]
    if start == end or next_start == next_end:
        return False
    if next_start < end:
        return True
    before, after = prompt.text[end - 1], prompt.text[next_start]
    if next_start > end:
        return False
    if _HAN.match(before) and _HAN.match(after):
        return end not in words
    return _in_spaced_word(before) and _in_spaced_word(after)


def _word_starts(text: str) -> frozenset[int]:
    return frozenset(itertools.accumulate(map(len, rjieba.cut(text)), initial=0))


def _in_spaced_word(character: str) -> bool:
    """Whether a character is of a word that spaces part from others: Han, kana, Thai and their like are not."""
    if not (character.isalnum() or unicodedata.category(character) == "Mn"):
        return False
    name = unicodedata.name(character, "")
    return not name.startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"))
