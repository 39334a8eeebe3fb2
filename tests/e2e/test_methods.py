"""Every method of adapting, over every quantisation: what is saved is what was trained, and merges and resumes so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ift_peft.adapters.merge import merge
from ift_peft.infer.load import open_parts
from ift_peft.model.tokenizer import locate_base
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.sections import Method
from ift_peft.train import run as runs
from ift_peft.train.run import resume, train
from ift_peft.train.session import Session
from tests.train.small import small

TINY = locate_base("tiny").folder
METHODS = get_args(Method)
STEPS = ("training.max_steps=3", "training.per_device_train_batch_size=4", "training.learning_rate=1e-2")
# Largest difference of logits, which are about 10 in size. TRL rounds a LoRA over packed weights to bfloat16, and
# PEFT opens it in float32; all else is the rounding of float32.
BOUND = 2e-4
BOUND_BFLOAT16 = 0.1
IDS = torch.arange(5, 45).reshape(2, 20)


def recipe_of(folder: Path, method: str, quantization: str = "none", *more: str) -> Any:
    rank = () if method == "ia3" else ("adapter.r=4",)
    dropout = "0.0" if method in ("pissa", "olora", "ia3") else "0.1"
    return small(
        folder,
        *("adapter.r=16",) * (method == "ia3"),
        *rank,
        "adapter.embeddings=false",
        f"adapter.lora_dropout={dropout}",
        f"adapter.method={method}",
        f"base.quantization={quantization}",
        *STEPS,
        *more,
    )


def stock_base(quantization: str) -> Any:
    settings = {
        "none": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    }[quantization]
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, quantization_config=settings).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def furthest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


Seen = dict[str, torch.Tensor]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The logits of the trained model and of its base, as they are in memory just before the adapter is saved."""
    found: Seen = {}
    save = runs._save_adapter

    def look_and_save(session: Session, scores: dict[str, Any]) -> None:
        session.model.eval()
        found["adapter"] = logits(session.model)
        with session.model.disable_adapter():
            found["base"] = logits(session.model)
        save(session, scores)

    monkeypatch.setattr(runs, "_save_adapter", look_and_save)
    return found


CASES = [
    (method, quantization)
    for method in METHODS
    for quantization in ("none", "int8", "nf4")
    if method != "loftq" or quantization == "nf4"
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "quantization"), CASES)
def test_what_is_saved_is_what_was_trained(tmp_path: Path, seen: Seen, method: str, quantization: str) -> None:
    run = train(recipe_of(tmp_path, method, quantization), root=tmp_path / "runs", reporter=Silent())
    base = stock_base(quantization)
    assert furthest(logits(base), seen["base"]) < BOUND  # switched off, the adapter leaves the base
    stock = PeftModel.from_pretrained(base, run.adapter).eval()
    bound = BOUND_BFLOAT16 if quantization == "int8" and method in ("lora", "rslora") else BOUND
    found = logits(stock)
    assert furthest(found, seen["adapter"]) < bound
    assert furthest(seen["adapter"], seen["base"]) > 2 * bound  # and training changed more than that
    merged = merge(open_parts(run), output=tmp_path / "merged", dtype="float32", reporter=Silent())
    assert merged.max_logit_difference < BOUND
    reloaded = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32).eval()
    onto = stock_base(quantization if method == "loftq" else "none")
    assert furthest(logits(reloaded), logits(PeftModel.from_pretrained(onto, run.adapter).eval())) < BOUND
