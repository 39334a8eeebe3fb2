from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import LlamaConfig

from ift_peft.data.render import Renderer
from ift_peft.data.row import Message, ask
from ift_peft.infer.generation import generate_all
from ift_peft.infer.load import Parts
from ift_peft.infer.predict import generate

TEXTS = [
    "很好",
    "The room was dirty and the staff rude, but breakfast was fine.",
    "屏幕三天就坏了，客服不理人。" * 4,
    "好。",
    "A film for the whole family.",
    "物流很快，包装也好，下次还会再来。",
    "不",
]
PROMPTS = [ask(text, instruction="请分类。", system=None) for text in TEXTS]


def one_by_one(model: torch.nn.Module, renderer: Renderer, prompt: tuple[Message, ...]) -> str:
    parts = cast(Parts, SimpleNamespace(renderer=renderer, tokenizer=renderer.tokenizer))
    return generate(model, parts, prompt, max_new_tokens=24)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 32])
def test_batches_give_the_text_of_each_prompt_alone(
    model: torch.nn.Module, renderer: Renderer, batch_size: int
) -> None:
    alone = [[one_by_one(model, renderer, prompt)] for prompt in PROMPTS]
    seen: list[tuple[int, int]] = []
    together = generate_all(
        model,
        renderer,
        PROMPTS,
        max_new_tokens=24,
        batch_size=batch_size,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert together == alone
    assert len({text for (text,) in alone}) > 1
    assert seen[-1] == (len(PROMPTS), len(PROMPTS))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_greedy_is_the_likeliest_token_without_a_cache(model: torch.nn.Module, renderer: Renderer) -> None:
    ((text,), *_) = generate_all(model, renderer, PROMPTS, max_new_tokens=12, batch_size=4)
    (ids,) = renderer.prompts(PROMPTS[:1])
    length = len(ids)
    with torch.no_grad():
        for _ in range(12):
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            ids = [*ids, token]
            if token == renderer.end_token_id:
                break
    assert text == renderer.tokenizer.decode(ids[length:], skip_special_tokens=True).strip()


def test_answers_stop_at_the_end_token_and_at_the_limit(model: torch.nn.Module, renderer: Renderer) -> None:
    asked: list[Any] = []
    original = model.generate

    def spy(**arguments: Any) -> Any:
        asked.append(arguments)
        return original(**arguments)

    class Spied(torch.nn.Module):
        generate = staticmethod(spy)
        config = model.config

        def parameters(self, recurse: bool = True) -> Any:
            return model.parameters(recurse)

    answers = generate_all(Spied().eval(), renderer, PROMPTS, max_new_tokens=3, batch_size=4)
    assert all(len(renderer.tokenizer(text)["input_ids"]) <= 4 for (text,) in answers)
    widths = [call["input_ids"].shape[1] for call in asked]
    assert widths == sorted(widths, reverse=True)
    assert all(call["eos_token_id"] == renderer.end_token_id and call["use_cache"] for call in asked)
    assert all(bool((call["attention_mask"][:, -1] == 1).all()) for call in asked)  # padding on the left


@pytest.mark.slow
def test_draws_belong_to_the_prompt_and_not_to_the_batch(model: torch.nn.Module, renderer: Renderer) -> None:
    def draw(prompts: list[tuple[Message, ...]], *, batch_size: int, seed: int = 0) -> list[list[str]]:
        return generate_all(
            model,
            renderer,
            prompts,
            max_new_tokens=8,
            batch_size=batch_size,
            samples=3,
            temperature=1.0,
            top_p=0.95,
            seed=seed,
        )

    drawn = draw(PROMPTS, batch_size=5)
    assert [len(samples) for samples in drawn] == [3] * len(PROMPTS)
    assert draw(PROMPTS, batch_size=1) == drawn
    assert draw(PROMPTS[::-1], batch_size=4) == drawn[::-1]
    assert draw(PROMPTS, batch_size=5, seed=1) != drawn
    assert any(len(set(samples)) > 1 for samples in drawn)


def test_draws_follow_the_temperature(renderer: Renderer) -> None:
    """The first token of 600 draws, against the softmax of a model that gives the same logits everywhere."""
    logits = torch.full((len(renderer.tokenizer),), -50.0)
    chosen = renderer.tokenizer("一二三")["input_ids"][-3:]
    logits[chosen] = torch.tensor([2.0, 1.0, 0.0])

    class Constant(torch.nn.Module):
        config = LlamaConfig()

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def generate(self, **arguments: Any) -> torch.Tensor:
            ids = arguments["input_ids"]
            scores = logits.repeat(len(ids), 1)
            for processor in arguments["logits_processor"]:
                scores = processor(ids, scores)
            return torch.cat([ids, scores.argmax(dim=1, keepdim=True)], dim=1)

    (samples,) = generate_all(
        Constant(), renderer, PROMPTS[:1], max_new_tokens=1, batch_size=50, samples=600, temperature=2.0
    )
    counts = Counter(samples)
    expected = torch.softmax(torch.tensor([1.0, 0.5, 0.0]), dim=0).tolist()
    texts = [renderer.tokenizer.decode([token]).strip() for token in chosen]
    assert len(set(texts)) == 3
    assert [counts[text] / 600 for text in texts] == pytest.approx(expected, abs=0.07)


def test_no_prompts_give_no_answers_and_the_mode_stays(model: torch.nn.Module, renderer: Renderer) -> None:
    assert generate_all(model, renderer, [], max_new_tokens=4, batch_size=2) == []
    model.train()
    generate_all(model, renderer, PROMPTS[:1], max_new_tokens=1, batch_size=2)
    assert model.training
    model.eval()
