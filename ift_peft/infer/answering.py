"""One request while it is answered: the tokens chosen for it, its text, and why it ends."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ift_peft.infer.request import FinishReason, Piece, Stream
from ift_peft.infer.sampling import Choices, TokenLogprob, draw, logprob_of
from ift_peft.infer.text import TextStream


class Row:
    """One request in the batch, or waiting for it."""

    def __init__(self, stream: Stream, limit: int, tokenizer: Any, end_token: int) -> None:
        request = stream.request
        self.stream, self.limit = stream, limit
        self.slot = 0  # of its adapter, once that is held
        self.text = TextStream(tokenizer, request.stop)
        self.choices = None if request.choices is None else Choices(request.choices, end_token)
        self.generator = random.Random(stream.seed % 2**64)  # Python's own takes -7 for 7
        self.count = 0
        self.token = -1  # the last one, which the next step is given
        self._tokens: list[int] = []  # since the last piece
        self._logprobs: list[TokenLogprob] = []

    def choose(self, logits: Tensor, likeliest: int) -> int:
        """The next token, by its logits (vocabulary,)."""
        request = self.stream.request
        allowed = None if self.choices is None else torch.tensor(self.choices.allowed(), device=logits.device)
        if request.temperature > 0:
            among = logits if allowed is None else logits[allowed]
            place = draw(among, temperature=request.temperature, top_p=request.top_p, generator=self.generator)
        elif allowed is None:
            place = likeliest
        else:
            place = int(logits[allowed].argmax())
        token = place if allowed is None else int(allowed[place])
        if request.logprobs is not None:
            self._logprobs.append(logprob_of(logits, token, request.logprobs))
        return token

    def take(self, token: int, end_tokens: Collection[int]) -> FinishReason | None:
        """Go on by one token; why the answer ends with it, if it does."""
        self.token, self.count = token, self.count + 1
        self._tokens.append(token)
        complete = self.choices is not None and self.choices.take(token)
        if token in end_tokens:
            return self._last("stop")
        text = self.text.push(token)
        if self.text.stopped or complete:
            return self._last("stop", text)
        if self.count == self.limit:
            return self._last("length", text)
        if text:
            self._put(text)
        return None

    def cancel(self) -> None:
        """End the answer with what there is of it."""
        try:
            self._last("cancelled")
            self.stream.end("cancelled")
        except Exception as error:  # as of a tokenizer that cannot decode what is held back
            self.stream.fail(error)

    def _last(self, reason: FinishReason, text: str = "") -> FinishReason:
        text += self.text.finish()
        if text or self._tokens:
            self._put(text)
        return "stop" if self.text.stopped and reason == "length" else reason

    def _put(self, text: str) -> None:
        self.stream.put(Piece(text, tuple(self._tokens), tuple(self._logprobs)))
        self._tokens, self._logprobs = [], []
