"""Small random bases with adapters that stock PEFT made and saved, and what stock PEFT generates with them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

END = 2


def random_base(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def make_adapter(base: Any, folder: Path, *, seed: int = 0, size: float = 0.15, **settings: Any) -> Any:
    """A `PeftModel` on a copy of `base` with random LoRA weights, saved in `folder`."""
    form = {"target_modules": "all-linear", "fan_in_fan_out": base.config.model_type == "gpt2", **settings}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**form))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, size, generator=generator)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def stock(model: Any, prompt: Sequence[int], max_new_tokens: int) -> tuple[int, ...]:
    """What transformers' generate gives, greedily, to one prompt alone."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=0,
    )
    return tuple(output[0, len(prompt) :].tolist())


def random_prompts(*lengths: int, vocabulary: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(3, vocabulary, (n,), generator=generator).tolist()) for n in lengths]


@contextmanager
def out_of_memory(owner: Any, name: str, *, at: int) -> Iterator[None]:
    """The `at`-th call of a function finds no memory; all others are made as ever."""
    made, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments: Any, **named: Any) -> Any:
        if next(calls) == at:
            raise torch.OutOfMemoryError("out of memory")
        return made(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, call)
        yield
    assert next(calls) > at
