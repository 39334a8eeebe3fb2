"""Answers of a run to new texts: a label with probabilities, or generated text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TextStreamer

from ift_peft.data.render import Renderer
from ift_peft.data.row import Message
from ift_peft.errors import ModelError
from ift_peft.infer.engine import Engine
from ift_peft.infer.generation import continue_all, room
from ift_peft.infer.likelihood import label_probabilities
from ift_peft.infer.load import Parts, Question
from ift_peft.infer.request import Request
from ift_peft.model.configuration import positions


@dataclass(frozen=True)
class Answer:
    """`text` is the label or the generated answer; `probabilities` of each label where the task is classification."""

    text: str
    probabilities: dict[str, float] | None
    truncated: bool

    def to_json(self) -> dict[str, Any]:
        line: dict[str, Any] = {"answer": self.text}
        if self.probabilities is not None:
            line["probabilities"] = {label: round(p, 6) for label, p in self.probabilities.items()}
        if self.truncated:
            line["truncated"] = True
        return line


def answer_all(
    model: Any,
    parts: Parts,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    on_text: Callable[[str], None] | None = None,
) -> Iterator[Answer]:
    """An answer to each question, in order. Generation is greedy; `on_text` receives it as it is generated, which is
    one question at a time; without it up to `batch_size` are answered together, where the base allows it.
    """
    fitted = [parts.fit_prompt(question) for question in questions]
    if parts.labels:
        for start in range(0, len(fitted), batch_size):
            batch = fitted[start : start + batch_size]
            probabilities = label_probabilities(
                model, parts.renderer, [prompt for prompt, _ in batch], parts.labels, batch_size=batch_size
            )
            for (_, truncated), row in zip(batch, probabilities, strict=True):
                named = dict(zip(parts.labels, map(float, row), strict=True))
                yield Answer(max(named, key=lambda label: named[label]), named, truncated)
        return
    together = None
    if on_text is None and len(fitted) > 1:
        together = _together(model, parts, [prompt for prompt, _ in fitted], max_new_tokens, max_rows=batch_size)
    for number, (prompt, truncated) in enumerate(fitted):
        if together is not None:
            text = together[number]
        else:
            text = generate(model, parts, prompt, max_new_tokens=max_new_tokens, on_text=on_text)
        yield Answer(text, None, truncated)


def _together(
    model: Any, parts: Parts, prompts: Sequence[Sequence[Message]], max_new_tokens: int, *, max_rows: int
) -> list[str] | None:
    """The answers of `generate` to many prompts at once; None where an engine does not give the same tokens."""
    assert isinstance(parts.renderer, Renderer)  # a classifier has labels and is not asked to write
    if getattr(model, "is_loaded_in_8bit", False):
        max_rows = 1  # what LLM.int8 keeps unquantised in one row depends on the others
    try:
        engine = Engine(model, parts.tokenizer, end_token_ids={parts.renderer.end_token_id}, max_rows=max_rows)
    except ModelError:
        return None
    ids = parts.renderer.prompts(prompts)
    longest = max(map(len, ids), default=0) + max_new_tokens
    if engine.positions != positions(model.config) and longest > (engine.positions or 0):
        return None  # alone, rows may be longer
    found = engine.run([Request(tuple(one), max_new_tokens=max_new_tokens) for one in ids])
    return [one.text.strip() for one in found]


class _CallbackStreamer(TextStreamer):
    """Hands each finished piece of text to a function instead of printing it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


def generate(
    model: Any,
    parts: Parts,
    prompt: Sequence[Message],
    *,
    max_new_tokens: int,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The greedy answer to one prompt, up to the end token that training taught, `max_new_tokens`, or the base's last
    position.
    """
    streamer = _CallbackStreamer(parts.tokenizer, on_text) if on_text is not None else None
    assert isinstance(parts.renderer, Renderer)  # a classifier has labels and is not asked to write
    ids = parts.renderer.prompts([prompt])
    left = room(model, len(ids[0]))
    if left is not None:
        max_new_tokens = max(1, min(max_new_tokens, left))
    return continue_all(model, parts.renderer, ids, max_new_tokens=max_new_tokens, streamer=streamer)[0]
