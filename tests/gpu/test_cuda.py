"""On a CUDA device: the same recipe over packed NF4 weights, and the same parity. Skipped, and counted, without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ift_peft.adapters.merge import merge
from ift_peft.evaluate.run import evaluate_run
from ift_peft.infer.load import load_model, open_parts
from ift_peft.model.base import choose_dtype
from ift_peft.recipe import load_recipe
from ift_peft.reporter import Silent
from ift_peft.train.run import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the GPU path was not tested"),
]


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_a_run_trains_reloads_and_merges(quantization: str, tmp_path: Path) -> None:
    small = ["data.max_train_rows=64", "data.max_test_rows=32", "training.max_steps=4"]
    recipe = load_recipe("sentiment", [*small, f"base.quantization={quantization}"])
    run = train(recipe, root=tmp_path, reporter=Silent())
    parts = open_parts(run)
    model, notes = load_model(parts)
    assert next(model.parameters()).device.type == "cuda"
    assert not notes, "weights stay packed on a GPU"
    again = evaluate_run(run, data=None, reporter=Silent())
    assert again["adapter"]["accuracy"] == run.read("scores.json")["adapter"]["accuracy"]
    result = merge(parts, output=tmp_path / "merged", dtype="float32", reporter=Silent())
    assert result.max_logit_difference < 1e-3


def test_the_compute_type_suits_the_device() -> None:
    expected = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    assert choose_dtype("auto", torch.device("cuda")) == expected
