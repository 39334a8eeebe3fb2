"""What is looked at of an adapter's files before PEFT makes room for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ift_peft.infer.adapter_files import USUAL_RANKS, adapter_faults


@pytest.mark.parametrize("more", [0, 1])
def test_as_many_ranks_as_the_weights_have_and_no_more(tmp_path: Path, more: int) -> None:
    """Also of a base whose every module is narrower than the rank."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    ranks = USUAL_RANKS + 7
    adapted = get_peft_model(model, LoraConfig(r=ranks, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].r += more
    adapted.save_pretrained(tmp_path)
    told = [error.expected for error in adapter_faults(tmp_path)]
    assert told == ([f"a rank of 1 to {ranks:,}"] if more else [])
