"""Single tokens as log-probabilities show them: their bytes, and a text that no two tokens of a place share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from ift_peft.infer.sampling import TokenLogprob
from ift_peft.infer.text import BYTE


class TokenNames:
    """Of one tokenizer. `ends` are the tokens that end an answer and are no part of its text."""

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        self.ends = ends
        self._tokenizer = tokenizer
        self._silent = frozenset(tokenizer.all_special_ids)
        self._added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        self._named = lru_cache(maxsize=65536)(self._name)

    def of(self, token: int) -> tuple[str, list[int]]:
        """The token's text and its bytes; a token that is no whole text is `bytes:\\x..`, as OpenAI writes it."""
        text, raw = self._named(token)
        return text, list(raw)

    def length(self, token: int) -> int:
        """Bytes that the token has in a text."""
        return 0 if token in self._silent else len(self._named(token)[1])

    def _name(self, token: int) -> tuple[str, bytes]:
        raw = self._bytes(token)
        try:
            return raw.decode("utf-8"), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{one:02x}" for one in raw), raw

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token]).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # of embeddings that are there to fill up, without a token
            return b""
        if self._byte_level is not None and all(letter in self._byte_level for letter in piece):
            return bytes(self._byte_level[letter] for letter in piece)
        if BYTE.fullmatch(piece):
            return bytes([int(piece[3:-1], 16)])
        return str(piece).replace("\u2581", " ").encode()  # SentencePiece's space

    @cached_property
    def _byte_level(self) -> dict[str, int] | None:
        """The letters that stand for bytes, where the tokenizer's vocabulary is of bytes (GPT-2)."""
        decoder = json.loads(self._tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
        kinds = {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))}
        return {letter: byte for byte, letter in bytes_to_unicode().items()} if "ByteLevel" in kinds else None


class TokensOfText:
    """Of an answer that a stop string may end: the tokens that begin in its text, as that comes.

    Tokens that begin later wait, as the text that is held back may turn out to be the stop string's.
    """

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._text = self._at = 0  # bytes: of the text, and where the first token that waits begins
        self._waiting: list[TokenLogprob] = []

    def take(self, text: str, tokens: Sequence[TokenLogprob]) -> list[TokenLogprob]:
        """What of the text's next piece and of those that waited begins in it."""
        self._waiting += tokens
        if text and not self._text and self._waiting:
            begins = bytes(self._names.of(self._waiting[0].token)[1])
            if begins.startswith(b" ") and not text.startswith(" "):  # SentencePiece's first, which no text shows
                self._at = -1
        self._text += len(text.encode())
        count = 0
        while count < len(self._waiting) and self._at < self._text:
            self._at += self._names.length(self._waiting[count].token)
            count += 1
        told, self._waiting = self._waiting[:count], self._waiting[count:]
        return told

    def rest(self, *, stopped: bool) -> list[TokenLogprob]:
        """At the answer's end: what waits, unless a stop string ended it."""
        return [] if stopped else self._waiting
