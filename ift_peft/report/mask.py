"""The golden example token by token: what a model was shown, and what of it was learnt. Loads no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IGNORE = -100  # torch's ignore_index; data.render's, without importing transformers for it
MOST_TOKENS = 800
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Piece:
    """One token, or the tokens that share a character; `text` shows line ends as ↵."""

    text: str
    tokens: int
    supervised: bool


@dataclass(frozen=True)
class Mask:
    """`left_out` tokens after those shown are not."""

    pieces: tuple[Piece, ...]
    tokens: int
    supervised: int
    left_out: int


def mask(golden: Mapping[str, Any], adapter: Path) -> Mask | str:
    """The golden example by the tokenizer that lies with the adapter, or why it cannot be shown."""
    path = adapter / "tokenizer.json"
    if not path.is_file():
        return "the adapter's folder has no tokenizer.json to decode it with"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    ids, labels = golden["input_ids"], golden["labels"]
    shown = window(labels)
    pieces = decoded(ids[shown], labels[shown], lambda part: tokenizer.decode(list(part), skip_special_tokens=False))
    return Mask(tuple(pieces), len(ids), sum(label != IGNORE for label in labels), len(ids) - len(ids[shown]))


def window(labels: Sequence[int]) -> slice:
    """The tokens to show of a long example: as many before the end of its supervised part as fit."""
    if len(labels) <= MOST_TOKENS:
        return slice(0, len(labels))
    last = max((at for at, label in enumerate(labels) if label != IGNORE), default=MOST_TOKENS - 1)
    start = max(0, last + 1 - MOST_TOKENS)
    return slice(start, start + MOST_TOKENS)


def decoded(ids: Sequence[int], labels: Sequence[int], decode: Decode) -> list[Piece]:
    """Each token's text as it stands after those before it; tokens that hold a part of a character are joined.

    Tokens are decoded with the one before them, as most tokenizers write a leading space only there.
    """
    pieces: list[Piece] = []
    start = read = 0
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[start:read]), decode(ids[start:end])
        supervised = labels[end - 1] != IGNORE
        changes = end < len(ids) and (labels[end] != IGNORE) != supervised
        if now.endswith(REPLACEMENT) and end < len(ids) and not changes:
            continue
        text = now[len(before) :] if now.startswith(before) else decode(ids[read:end])
        pieces.append(Piece(text.replace("\n", "↵\n"), end - read, supervised))
        start, read = read, end
    return pieces
