"""Generated tokens as text, piece by piece."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

HALF_A_CHARACTER = "\ufffd"  # what tokenizers show bytes as that are no whole character
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of one byte, as SentencePiece has


class TextStream:
    """Text of tokens as they come: no part of a character, and no part of what may become a stop string.

    Together the pieces are what the tokenizer makes of all tokens; but where tokens of bytes are characters before
    others are none, those stay, while the tokenizer would show each byte as none. `stopped` is set once a stop string
    came, across however many tokens; it and what follows it are not given out. Tried instead: tokenizers' own
    `DecodeStream`, which raises where bytes in a row are no character.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._silent = frozenset(tokenizer.all_special_ids)
        self._context: list[int] = []  # tokens whose text is out, as far as the next ones' depends on them
        self._new: list[int] = []
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token, which may be none."""
        if self.stopped:
            return ""
        self._new.append(token)
        if token in self._silent:
            return ""
        text = self._decode()
        if text.endswith(HALF_A_CHARACTER):
            return ""
        self._context, self._new = self._new, []
        return self._release(text)

    def finish(self) -> str:
        """What was held back, where no stop string came; half a character as the tokenizer shows it."""
        if self.stopped:
            return ""
        piece = self._release(self._decode())
        held, self._held = self._held, ""
        return piece if self.stopped else piece + held

    def _decode(self) -> str:
        """The text of the new tokens after the others: it may begin with a space for that."""
        before, whole = self._text(self._context), self._text(self._context + self._new)
        if not whole.startswith(before) and self._ends_in_a_byte(self._context):
            return self._text(self._new)  # which begins with bytes that are no character, so with no space either
        return whole[len(before) :]

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _ends_in_a_byte(self, tokens: Sequence[int]) -> bool:
        return bool(tokens) and BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(tokens[-1]))) is not None

    def _release(self, piece: str) -> str:
        if not self._stop:
            return piece
        self._held += piece
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max(self._begun(stop) for stop in self._stop)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def _begun(self, stop: str) -> int:
        """How much of a stop string the held text ends with."""
        most = min(len(stop) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0)
