"""Every method of adapting, over every quantisation: what is saved is what was trained, and merges and resumes so."""

from __future__ import annotations

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
BOUND = 2e-4  # largest difference of logits, which are about 10 in size: the rounding of float32
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
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, quantization_config=settings).eval()
    if quantization == "nf4":  # packed, bitsandbytes computes in bfloat16 on a CPU
        model.dequantize(dtype=torch.float32)
        model.is_loaded_in_4bit = False
    return model


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


REFUSED = {("loftq", "none"), ("loftq", "int8"), ("dora", "int8")}
CASES = [(method, quant) for method in METHODS for quant in ("none", "int8", "nf4") if (method, quant) not in REFUSED]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "quantization"), CASES)
def test_what_is_saved_is_what_was_trained(tmp_path: Path, seen: Seen, method: str, quantization: str) -> None:
    run = train(recipe_of(tmp_path, method, quantization), root=tmp_path / "runs", reporter=Silent())
    base = stock_base(quantization)
    assert furthest(logits(base), seen["base"]) < BOUND  # switched off, the adapter leaves the base
    stock = PeftModel.from_pretrained(base, run.adapter).eval()
    if quantization == "int8" and method in ("lora", "rslora"):  # TRL trains these in bfloat16, as QLoRA did
        for name, parameter in stock.named_parameters():
            parameter.data = parameter.data.to(torch.bfloat16 if "lora_" in name else parameter.dtype)
    assert furthest(logits(stock), seen["adapter"]) < BOUND
    assert furthest(seen["adapter"], seen["base"]) > 100 * BOUND
    if quantization != "none" and method != "loftq":
        return  # merged into the unquantised base all the same
    merged = merge(open_parts(run), output=tmp_path / "merged", dtype="float32", reporter=Silent())
    assert merged.max_logit_difference < BOUND
    reloaded = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32).eval()
    assert furthest(logits(reloaded), seen["adapter"]) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pissa", "olora", "loftq", "eva", "vera", "ia3", "adalora"])
def test_a_resumed_run_ends_in_the_weights_of_an_uninterrupted_one(tmp_path: Path, method: str) -> None:
    checkpoints = ("training.save_strategy=steps", "training.save_steps=1", "training.save_total_limit=3")
    whole = train(recipe_of(tmp_path, method, "nf4", *checkpoints), root=tmp_path / "runs", reporter=Silent())
    cut = RunDir(shutil.copytree(whole.path, tmp_path / "runs" / "cut"))
    shutil.rmtree(cut.adapter)
    for step in (2, 3):
        shutil.rmtree(cut.checkpoints / f"checkpoint-{step}")
    cut.update_manifest(status="interrupted")
    resume(cut, reporter=Silent())
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
