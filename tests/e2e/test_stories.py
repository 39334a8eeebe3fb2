"""A real pretrained Llama of 260,000 parameters through all that comes after training; test_pipeline.py: a pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ift_peft.adapters.combine import Asked, combine
from ift_peft.adapters.export.run import export
from ift_peft.adapters.merge import merge
from ift_peft.evaluate.ensemble import evaluate_ensemble
from ift_peft.infer.load import load_model, open_parts
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.train.run import train
from tests.train.small import small

pytestmark = pytest.mark.slow
SETTINGS = ("training.max_steps=4", "training.max_length=256", "adapter.embeddings=false", "adapter.lora_dropout=0")


@pytest.fixture(scope="module")
def runs(stories: str, tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """Two seeds of one task."""
    folder = tmp_path_factory.mktemp("stories")
    recipes = [small(folder, f"base.model={stories}", f"training.seed={seed}", *SETTINGS) for seed in (0, 1)]
    return [train(recipe, root=folder / "runs", reporter=Silent()) for recipe in recipes]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 403, 407, 261, 378, 31, 17, 99]])).logits


def test_merged_combined_and_asked_together(runs: list[RunDir], stories: str, tmp_path: Path) -> None:
    parts = open_parts(runs[0])
    merged = merge(parts, output=tmp_path / "merged", dtype="float32", reporter=Silent())
    adapted = logits(load_model(parts)[0])
    assert (adapted - logits(AutoModelForCausalLM.from_pretrained(stories))).abs().max() > 1e-3
    assert (adapted - logits(AutoModelForCausalLM.from_pretrained(merged.folder))).abs().max() < 1e-4
    both = combine(runs, Asked("linear"), name="both", root=tmp_path / "runs", reporter=Silent())
    found = logits(load_model(open_parts(both))[0])
    other = logits(load_model(open_parts(runs[1]))[0])
    assert (found - adapted).abs().max() > 1e-5 and (found - other).abs().max() > 1e-5
    scores = evaluate_ensemble(runs, "mean_probs", data=None, reporter=Silent())
    alone = [run.read("scores.json")["adapter"]["accuracy"] for run in runs]
    assert [own["accuracy"] for own in scores["members"].values()] == alone


@pytest.mark.parametrize("to", ["peft", "gguf"])
def test_exported(runs: list[RunDir], stories: str, tmp_path: Path, to: str) -> None:
    parts = open_parts(runs[0])
    found = export(parts, to=to, output=tmp_path / "out", reporter=Silent())  # type: ignore[arg-type]
    assert json.loads((found.folder / "export.json").read_text("utf-8"))["to"] == to
    assert not any(stories in path.read_text("utf-8", errors="ignore") for path in found.folder.glob("*.json"))
    if to == "peft":
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories), found.folder)
        assert torch.equal(logits(stock), logits(load_model(parts)[0]))
    else:
        (file,) = found.folder.glob("*.gguf")
        assert file.read_bytes()[:4] == b"GGUF"
