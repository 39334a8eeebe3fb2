"""From what a client sent to what an engine is asked. Imports torch, so not for modules that a start imports."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ift_peft.infer.request import Request
from ift_peft.serve.errors import ApiError
from ift_peft.serve.inference.bodies import ChatBody, CompletionBody, Sampling
from ift_peft.serve.inference.hosts import Model
from ift_peft.serve.settings import Limits

LEAST_TOP_P = 1e-9  # for 0, by which clients mean the likeliest token alone


def chat_requests(body: ChatBody, model: Model, limits: Limits) -> list[Request]:
    """One for each choice. Raises `ApiError` for a prompt that is too long, `DataError` for one no template takes."""
    messages = [message.plain() for message in body.messages]
    _require_short(sum(len(message["content"]) for message in messages), model, limits, "messages")
    ids = model.prompt(messages)
    return _each(body, [ids], model, body.most(limits), body.likeliest, "messages")


def text_requests(body: CompletionBody, model: Model, limits: Limits) -> list[Request]:
    """One for each choice of each prompt, in this order. Raises `ApiError` for a prompt that is too long or empty."""
    for one in body.prompts:
        if isinstance(one, str):
            _require_short(len(one), model, limits, "prompt")
    prompts = [model.ids(one) if isinstance(one, str) else one for one in body.prompts]
    return _each(body, prompts, model, body.most(limits), body.likeliest, "prompt")


def texts_of(body: CompletionBody, model: Model) -> list[str]:
    """The prompts as texts, to be echoed."""
    decode = model.host.renderer.tokenizer.decode
    return [one if isinstance(one, str) else str(decode(one)) for one in body.prompts]


def _require_short(characters: int, model: Model, limits: Limits, param: str) -> None:
    """Refuse what cannot but be too long before it is made tokens of: of megabytes, that takes a core minutes."""
    most = min(model.host.most_characters or limits.prompt_characters, limits.prompt_characters)
    if characters > most:
        message = f"Your {param} has {characters} characters; with this model it can have {most} at most."
        raise ApiError(400, message, code="context_length_exceeded", param=param)


def _each(
    body: Sampling, prompts: Sequence[list[int]], model: Model, most: int, likeliest: int | None, param: str
) -> list[Request]:
    positions = model.host.engine.positions
    for ids in prompts:
        if not ids:
            raise ApiError(400, "A prompt has no tokens.", code="invalid_value", param=param)
        if positions is not None and len(ids) >= positions:
            message = (
                f"This model's maximum context length is {positions} tokens, of which an answer needs one at least. "
                f"However, your {param} resulted in {len(ids)} tokens."
            )
            raise ApiError(400, message, code="context_length_exceeded", param=param)
    return [
        Request(
            prompt=tuple(ids),
            adapter=model.adapter,
            max_new_tokens=most,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else max(body.top_p, LEAST_TOP_P),
            seed=seed_of(body.seed, number * body.choices + choice),
            stop=body.stops,
            logprobs=likeliest,
        )
        for number, ids in enumerate(prompts)
        for choice in range(body.choices)
    ]


def seed_of(seed: int | None, number: int) -> int | None:
    """Of the `number`th answer: the first has the one given, the others one that follows from it."""
    if seed is None or number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:8], "big")
