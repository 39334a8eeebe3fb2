"""Which tokens' log-probabilities are told of an answer that a stop string may end."""

from __future__ import annotations

import pytest

from ift_peft.infer.sampling import TokenLogprob
from ift_peft.infer.text import TextStream
from ift_peft.model.tokenizer import load_tokenizer, locate_base
from ift_peft.serve.inference.tokens import TokenNames, TokensOfText


@pytest.mark.parametrize(
    ("pieces", "stop", "told"),
    [
        (["a", "a", "a", "b", "c"], "aab", 1),  # two of the first piece's tokens turn out to be the stop string's
        (["a", "a", "a", "c"], "aab", 4),  # the same, and are not
        (["a", "a"], "aab", 2),  # held back to the end
        (["I", "t", " is", " 2"], "s 2", 3),  # the one that the end lies in
        (["I", "t"], "I", 0),
        (["今", "天"], "天", 1),
    ],
)
def test_tokens_that_begin_in_the_text_are_told(pieces: list[str], stop: str, told: int) -> None:
    tokenizer = load_tokenizer(locate_base("tiny"))
    tokens = [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    count = len([token for piece in pieces[:told] for token in tokenizer(piece, add_special_tokens=False)["input_ids"]])
    names, text = TokenNames(tokenizer, frozenset()), TextStream(tokenizer, [stop])
    streamed, held, whole = TokensOfText(names), list[TokenLogprob](), ""
    out: list[int] = []
    for token in tokens:
        held.append(TokenLogprob(token, -1.0, ()))
        new = text.push(token)
        whole += new
        if new or text.stopped:
            out += [one.token for one in streamed.take(new, held)]
            held = []
    last = text.finish()
    out += [one.token for one in [*streamed.take(last, held), *streamed.rest(stopped=text.stopped)]]
    at_once = TokensOfText(names)
    given = [TokenLogprob(token, -1.0, ()) for token in tokens]
    once = [*at_once.take(whole + last, given), *at_once.rest(stopped=text.stopped)]
    assert out == [one.token for one in once] == tokens[:count]
