"""The check of each merged weight, where an adapter changes a layer's bias with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from ift_peft.adapters.weights import check_weights, probe_weights
from ift_peft.errors import MergeError
from ift_peft.model.adapter import peft_config
from ift_peft.model.quiet import quiet
from ift_peft.sections import Adapter


def qwen2() -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    return Qwen2ForCausalLM(config)


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))


def planted(model: PreTrainedModel, **settings: Any) -> Any:
    """An adapter on `model`, whose biases are no zeros, with all its tensors drawn at random."""
    model.name_or_path = "base"
    with quiet():
        adapted = get_peft_model(model, peft_config(Adapter(**settings), model, base_name="base", revision=None))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or name.endswith("bias"):
                parameter += 0.01 * torch.randn_like(parameter)
    return adapted.eval()


@pytest.mark.parametrize("make", [qwen2, gpt2], ids=["linear", "conv1d"])
@pytest.mark.parametrize("settings", [{"method": "ia3"}, {"bias": "lora_only"}], ids=["ia3", "lora"])
def test_a_bias_is_merged_as_the_adapter_makes_it(make: Any, settings: dict[str, Any]) -> None:
    adapted = planted(make(), **settings)
    before = {name: p.clone() for name, p in adapted.get_base_model().named_parameters() if name.endswith(".bias")}
    expected = probe_weights(adapted)
    with quiet():
        merged = adapted.merge_and_unload()
    found = probe_weights(merged)
    assert expected.keys() == found.keys()
    assert check_weights(expected, found, dtype="float32", what="it") == len(found)
    name, bias = next((name, p) for name, p in merged.named_parameters() if name.endswith(("q_proj.bias", "attn.bias")))
    if settings == {"method": "ia3"}:  # as it was, unscaled
        bias.data = before[name.replace(".bias", ".base_layer.bias")]
    else:
        bias.data *= 1.01
    with pytest.raises(MergeError, match=name):
        check_weights(expected, probe_weights(merged), dtype="float32", what="it")
