"""Where in a rendered text an answer lies: its own characters, and the special tokens that close it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ift_peft.errors import DataError

Span = tuple[int, int]  # first character, and the one after the last


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of all special tokens, the longest first."""
    specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(specials | {token for token in tokenizer.all_special_tokens if token}, key=len, reverse=True)


def holds_text(marked: str, specials: Sequence[str]) -> bool:
    """False for a marked piece of special tokens only, as some templates put after the last answer."""
    for token in specials:
        marked = marked.replace(token, "")
    return bool(marked.strip())


def answer_span(text: str, start: int, end: int, content: str, *, specials: Sequence[str]) -> Span:
    """The answer and the special tokens that close it, at the end of `text[start:end]`.

    One space before the answer is part of it, as in many tokenizers it is part of the answer's first token. Raises
    `DataError` where the template does not end it so.
    """
    body = end
    while body > start:
        shorter = len(text[start:body].rstrip()) + start
        closing = next((token for token in specials if text.endswith(token, start, shorter)), None)
        if closing is None:
            break
        body = shorter - len(closing)
    stripped = start + len(text[start:body].rstrip())
    closed = body
    while token := next((token for token in specials if text.startswith(token, closed, end)), None):
        closed += len(token)
    if not text.endswith(content, start, stripped) or closed == body or stripped != body:
        raise DataError(
            expected="the chat template to end an answer with its text and a special token",
            found=repr(text[max(start, end - 60) : end]),
            fix="correct the template, or remove special tokens from the answer",
        )
    first = body - len(content)
    return (first - 1 if first > start and text[first - 1] == " " else first, closed)
