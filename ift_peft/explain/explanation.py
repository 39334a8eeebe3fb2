"""Why a run's adapter answers a text as it does: the tokens that carried the answer, and the rows behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ift_peft.data.quality.finding import text_of
from ift_peft.data.render import Rendered
from ift_peft.errors import DataError
from ift_peft.explain.attribution import STEPS, Attribution, Method, attribute
from ift_peft.explain.influence import CAVEATS, Influence, Loss, TrainingRows, influence
from ift_peft.explain.pieces import Piece, prompt_pieces
from ift_peft.explain.score import ClassScore, Score, answer_loss, answer_score, class_loss
from ift_peft.infer.load import Parts
from ift_peft.infer.predict import answer_all
from ift_peft.model.quiet import quiet
from ift_peft.reporter import Reporter

DIGITS = 6


@dataclass(frozen=True)
class Explanation:
    """Of one answer to one text. `adapter` and `base` attribute the same score, with the adapter on and off.

    `score_name` says what the score is, `learnt` is prompt and answer as a training row would hold them, `truncated`
    whether the text had to be shortened.
    """

    text: str
    answer: str
    truncated: bool
    score_name: str
    method: Method
    pieces: tuple[Piece, ...]
    adapter: Attribution
    base: Attribution
    learnt: Rendered
    influence: Influence | None = None

    @property
    def probabilities(self) -> tuple[float, float] | None:
        """Of the answer, with the adapter and without; None where it was not chosen among several."""
        if self.score_name != "log-odds":
            return None
        return _probability(self.adapter.score), _probability(self.base.score)

    @property
    def strongest(self) -> list[int]:
        """The numbers of the pieces of instruction and text, those first that moved the score most."""
        own = [number for number, piece in enumerate(self.pieces) if piece.kind != "template"]
        return sorted(own, key=lambda number: -abs(self.adapter.values[number]))

    def to_json(self) -> dict[str, Any]:
        """As JSON; `start` and `end` of a piece are its tokens in the prompt."""
        pieces = zip(self.pieces, self.adapter.values, self.base.values, strict=True)
        return {
            "text": self.text,
            "answer": self.answer,
            "truncated": self.truncated,
            "score": self.score_name,
            "method": self.method,
            "adapter": _attribution_json(self.adapter),
            "base": _attribution_json(self.base),
            "pieces": [
                {
                    "text": piece.text,
                    "kind": piece.kind,
                    "start": piece.start,
                    "end": piece.end,
                    "adapter": round(adapter, DIGITS),
                    "base": round(base, DIGITS),
                }
                for piece, adapter, base in pieces
            ],
            "training_rows": None if self.influence is None else _influence_json(self.influence),
        }


def _attribution_json(found: Attribution) -> dict[str, float | None]:
    numbers = {"score": found.score, "baseline": found.baseline, "convergence_delta": found.delta}
    return {name: None if number is None else round(number, DIGITS) for name, number in numbers.items()}


def _influence_json(found: Influence) -> dict[str, Any]:
    sides = {"helping": found.helping, "opposing": found.opposing}
    return {
        "looked_at": found.looked,
        "of": found.rows,
        "adapter_weights": found.weights,
        **{
            name: [
                {
                    "where": pull.row.where,
                    "similarity": round(pull.similarity, DIGITS),
                    "text": text_of(pull.row),
                    "answer": pull.row.answer,
                }
                for pull in pulls
            ]
            for name, pulls in sides.items()
        },
        "caveats": list(CAVEATS),
    }


def _probability(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds)) if log_odds > -700 else 0.0


def explain(
    model: Any,
    parts: Parts,
    text: str,
    *,
    method: Method,
    answer: str | None = None,
    steps: int = STEPS,
    batch_size: int = 16,
    max_new_tokens: int = 256,
) -> Explanation:
    """Attribute the run's answer to `text`, or the given `answer`, to the pieces of its prompt.

    Raises `DataError` where a given answer is none of the run's labels.
    """
    question = parts.ask(text)
    fitted, truncated = parts.fit_question(question)
    if answer is None:
        answer = next(answer_all(model, parts, [question], max_new_tokens=max_new_tokens)).text
    prompt, pieces = prompt_pieces(parts.renderer, fitted.messages, fitted.text)
    score, learnt = _score(parts, fitted.messages, prompt.ids, answer)
    attributed = partial(
        attribute,
        model,
        score,
        prompt.ids,
        pieces,
        method=method,
        pad_token_id=parts.tokenizer.pad_token_id,
        steps=steps,
        batch_size=batch_size,
    )
    with quiet():  # transformers warns that heads may read padding: no prompt here has any
        adapter = attributed()
        with model.disable_adapter():
            base = attributed()
    return Explanation(text, answer, truncated, score.name, method, tuple(pieces), adapter, base, learnt)


def _score(parts: Parts, messages: Sequence[dict[str, str]], ids: Sequence[int], answer: str) -> tuple[Score, Rendered]:
    """What is explained of an answer, and the row that would teach it."""
    candidates = parts.labels or (answer,)
    if answer not in candidates:
        raise DataError(
            expected=f"one of the run's labels: {', '.join(candidates)}", found=repr(answer), fix="give one of them"
        )
    rendered = parts.renderer.render([(*messages, {"role": "assistant", "content": word}) for word in candidates])
    chosen = candidates.index(answer)
    if parts.recipe.base.head == "sequence-classification":
        return ClassScore(chosen), rendered[chosen]
    return answer_score(ids, rendered, chosen=chosen), rendered[chosen]


def _loss(parts: Parts) -> Loss:
    """What training minimised, of one row."""
    loss = answer_loss if parts.recipe.base.head == "causal-lm" else class_loss
    return partial(loss, pad_token_id=parts.tokenizer.pad_token_id)


def with_training_rows(
    model: Any,
    parts: Parts,
    explanations: Sequence[Explanation],
    training: TrainingRows,
    *,
    rows: int,
    reporter: Reporter,
) -> list[Explanation]:
    """The explanations with the `rows` training rows that pulled most towards each answer, and most away from it."""
    answers = [one.learnt for one in explanations]
    halved = parts.recipe.adapter.subtracts_its_start
    found = influence(model, answers, training, _loss(parts), rows=rows, halved=halved, reporter=reporter)
    return [replace(one, influence=pulls) for one, pulls in zip(explanations, found, strict=True)]
