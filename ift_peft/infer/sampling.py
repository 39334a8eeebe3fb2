"""The next token of a row: the likeliest, or drawn, among all or among those that an allowed answer goes on with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprob:
    """A token with the natural log of its probability, and the likeliest tokens in its place.

    Probabilities are the model's own, before temperature, `top_p` and allowed answers.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Choices:
    """Allowed answers as token ids, and how far into them a row is.

    A greedy row takes the likeliest token that goes on in one of them, which is not always the likeliest answer:
    `likelihood.label_probabilities` finds that.
    """

    def __init__(self, answers: Sequence[Sequence[int]], end_token: int) -> None:
        self._answers = [tuple(answer) for answer in answers]
        self._end_token = end_token
        self._at = 0

    def allowed(self) -> list[int]:
        """Tokens that may come next, the end token where an answer that others go on from may end."""
        return sorted({self._end_token if len(one) == self._at else one[self._at] for one in self._answers})

    def take(self, token: int) -> bool:
        """Go on by one token; True where an answer is complete and no other goes on from it."""
        goes_on = [one for one in self._answers if len(one) > self._at and one[self._at] == token]
        ended = token == self._end_token and any(len(one) == self._at for one in self._answers)
        self._answers, self._at = goes_on, self._at + 1
        return ended or all(len(one) == self._at for one in goes_on)


def draw(logits: Tensor, *, temperature: float, top_p: float, generator: random.Random) -> int:
    """A place in `logits`, of shape (choices,), drawn at `temperature` out of the likeliest that make up `top_p`.

    One uniform number a token, of a generator that is the row's own: what is drawn does not depend on other rows.
    """
    logits = logits.float()
    # From the greatest down, which stays 0 at any temperature; float32 has none much smaller than this one.
    probabilities = ((logits - logits.max()) / max(temperature, 1e-30)).softmax(dim=-1)
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(descending=True, stable=True)
        inside = probabilities.cumsum(dim=-1) - probabilities < top_p
        inside[0] = True
        probabilities = probabilities * inside
    sums = probabilities.double().cumsum(dim=-1)
    target = generator.random() * sums[-1]
    place = torch.searchsorted(sums, target, right=True).clamp(max=len(sums) - 1)
    return int(place if order is None else order[place])


def logprob_of(logits: Tensor, token: int, top: int) -> TokenLogprob:
    """Of one row's logits, (vocabulary,)."""
    logs = logits.float().log_softmax(dim=-1)
    values, tokens = logs.topk(top)
    return TokenLogprob(token, float(logs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
