"""Certified merging: what is measured and written, and that a wrong merge never is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ift_peft.adapters import plan as planning
from ift_peft.adapters import shards
from ift_peft.adapters.merge import merge
from ift_peft.errors import MergeError
from ift_peft.infer.load import open_parts
from ift_peft.recipe import load_recipe
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.train.run import train

pytestmark = pytest.mark.slow


def test_a_broken_tie_is_caught(stories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a tied base, left tied to an embedding that the adapter changed."""
    rows = "".join(f'{{"text": "it was {word} {i}", "label": "{word}"}}\n' for i in range(12) for word in ("on", "off"))
    (tmp_path / "rows.jsonl").write_text(rows, "utf-8")
    (tmp_path / "tied.yaml").write_text(
        f"base: {{model: {stories}, device: cpu}}\nadapter: {{r: 4, embeddings: true}}\n"
        "data: {train: rows.jsonl, test_size: 6, labels: ['on', 'off']}\n"
        "evaluation: {forgetting: false}\ntraining: {max_steps: 3, learning_rate: 1e-2}\n",
        "utf-8",
    )
    parts = open_parts(train(load_recipe(str(tmp_path / "tied.yaml")), root=tmp_path / "runs", reporter=Silent()))
    good = merge(parts, output=tmp_path / "good", dtype="float32", reporter=Silent(), max_shard_size="200KB")
    assert len(list((tmp_path / "good").glob("*.safetensors"))) > 1
    assert good.max_logit_difference < 1e-3
    assert json.loads((tmp_path / "good" / "certificate.json").read_text("utf-8"))["written"]["untied"] is True
    monkeypatch.setattr(planning, "_untie", lambda *arguments: False)
    with pytest.raises(MergeError, match="a difference of"):
        merge(parts, output=tmp_path / "bad", dtype="float32", reporter=Silent())
    assert not (tmp_path / "bad").exists() and not list(tmp_path.glob(".*"))


def test_an_interrupted_merge_leaves_nothing(
    short_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_layer, seen = shards.merged_by_layer, []

    def interrupted(*arguments: Any) -> Tensor:
        seen.append(list(tmp_path.iterdir()))
        if len(seen) == 5:
            raise KeyboardInterrupt
        return by_layer(*arguments)

    monkeypatch.setattr(shards, "merged_by_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(open_parts(short_run), output=tmp_path / "merged", dtype="float32", reporter=Silent())
    assert seen[-1], "something was on disk by then"
    assert not list(tmp_path.iterdir())


def test_the_certificate_says_what_is_in_the_folder_and_nf4_loads_with_stock_transformers(
    short_run: RunDir, tmp_path: Path
) -> None:
    folder = tmp_path / "merged"
    result = merge(open_parts(short_run), output=folder, dtype="float32", reporter=Silent(), quantize="nf4")
    certificate = json.loads((folder / "certificate.json").read_text("utf-8"))
    for name, digest in certificate["written"]["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    adapter = (short_run.adapter / "adapter_model.safetensors").read_bytes()
    assert certificate["adapter"]["sha256"] == hashlib.sha256(adapter).hexdigest()
    by_name = {(one["onto"], one["quantization"]): one for one in certificate["candidates"]}
    assert set(by_name) == {(a, b) for a in ("dequantized", "unquantized") for b in ("none", "nf4")}
    assert by_name["dequantized", "none"]["kl_mean"] < 1e-9 < by_name["unquantized", "none"]["kl_mean"]
    assert by_name["dequantized", "none"]["same_labels"] == 60
    nearest = min(
        (one for one in certificate["candidates"] if one["quantization"] == "nf4"), key=lambda one: one["kl_mean"]
    )
    assert (result.written.onto, result.written.quantization) == (nearest["onto"], "nf4")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    ids = AutoTokenizer.from_pretrained(folder)("今天很好", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    assert "certificate.json" in (folder / "README.md").read_text("utf-8")
