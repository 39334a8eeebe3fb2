"""Answers to many prompts at once: batches of like length with a cache of keys and values."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from ift_peft.data.render import Renderer
from ift_peft.data.row import Message
from ift_peft.errors import ModelError
from ift_peft.infer.batches import Progress
from ift_peft.model.configuration import positions


@dataclass(frozen=True)
class _Request:
    """One answer to be generated: the ids of its prompt, and which prompt and sample it is."""

    ids: list[int]
    prompt: int
    sample: int


@torch.no_grad()
def generate_all(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
    samples: int = 1,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> list[list[str]]:
    """`samples` answers to each prompt, up to the end token that training taught or `max_new_tokens`.

    Raises `ModelError` for a prompt that leaves no room for that many.

    Without `temperature` greedy, as `predict.generate` does one by one. What is drawn depends on the prompt, `seed` and
    the number of the sample. In neither case does an answer depend on what else is in its batch, but for rounding.
    """
    was_training = model.training
    model.eval()
    asked = [
        _Request(ids, prompt, sample)
        for prompt, ids in enumerate(renderer.prompts(prompts))
        for sample in range(samples)
    ]
    # Longest first, so that memory runs out at once if at all.
    asked.sort(key=lambda request: -len(request.ids))
    left = room(model, len(asked[0].ids)) if asked else None
    if left is not None and left < max_new_tokens:
        raise ModelError(
            expected=f"room for {max_new_tokens} new tokens after every prompt",
            found=f"room for {max(0, left)} after one of {len(asked[0].ids)} tokens",
            fix=f"lower training.max_length by {max_new_tokens - left}, or evaluation.max_new_tokens",
        )
    answers = [[""] * samples for _ in prompts]
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        processors = None if temperature is None else _drawing(model, batch, temperature, top_p, seed)
        texts = continue_all(
            model, renderer, [request.ids for request in batch], max_new_tokens=max_new_tokens, processors=processors
        )
        for request, text in zip(batch, texts, strict=True):
            answers[request.prompt][request.sample] = text
        if progress is not None:
            progress(start + len(batch), len(asked))
    model.train(was_training)
    return answers


def room(model: Any, prompt_tokens: int) -> int | None:
    """Tokens that can be generated after a prompt of `prompt_tokens`; None where the base does not limit them."""
    most = positions(model.config)
    return None if most is None else most - prompt_tokens


@torch.no_grad()
def continue_all(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    processors: LogitsProcessorList | None = None,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """The answers to one batch of prompts, given as ids; a `streamer` takes one only.

    Prompts are padded on the left, so that all answers begin at one position.
    """
    tokenizer = renderer.tokenizer
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    padding = [width - len(ids) for ids in prompts]
    rows = [[tokenizer.pad_token_id] * left + ids for left, ids in zip(padding, prompts, strict=True)]
    mask = [[0] * left + [1] * (width - left) for left in padding]
    output = model.generate(
        input_ids=torch.tensor(rows, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=max_new_tokens,
        use_cache=True,
        do_sample=False,  # draws are made by the processors, of a generator for each row
        repetition_penalty=1.0,  # some bases' generation_config sets others
        no_repeat_ngram_size=0,
        eos_token_id=renderer.end_token_id,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=processors,
        streamer=streamer,
    )
    texts = []
    for ids in output[:, width:].tolist():
        # A finished row is filled up with padding, which some tokenizers do not hold to be special.
        end = ids.index(renderer.end_token_id) + 1 if renderer.end_token_id in ids else len(ids)
        texts.append(str(tokenizer.decode(ids[:end], skip_special_tokens=True)).strip())
    return texts


def _drawing(
    model: Any, batch: Sequence[_Request], temperature: float, top_p: float | None, seed: int
) -> LogitsProcessorList:
    device = next(model.parameters()).device
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p is not None:
        processors.append(TopPLogitsWarper(top_p))
    generators = []
    for request in batch:
        digest = hashlib.sha256(repr((seed, request.sample, request.ids)).encode()).digest()
        generators.append(torch.Generator(device).manual_seed(int.from_bytes(digest[:8]) >> 1))
    processors.append(_GumbelNoise(generators))
    return processors


class _GumbelNoise(LogitsProcessor):
    """Noise that makes the likeliest token a draw from the distribution, with a generator of its own for each row.

    The Gumbel-max method; transformers' own sampling draws all rows of a batch from one generator.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()
