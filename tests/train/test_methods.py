"""Settings that methods share: LoRA+, NEFTune, modules trained whole, and eva's search for directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ift_peft.adapters.merge import merge
from ift_peft.adapters.weighted import Combination, add_combined
from ift_peft.infer.likelihood import label_probabilities
from ift_peft.infer.load import held_out_rows, load_members, load_model, open_parts
from ift_peft.model.quiet import quiet
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.train.losses import as_base
from ift_peft.train.opening import open_session
from ift_peft.train.prepare import prepare
from ift_peft.train.run import train
from ift_peft.train.session import Session
from tests.e2e.small_base import make_base
from tests.train.small import small

NOT_IA3 = ("adapter.embeddings=false", "adapter.lora_dropout=0")
IDS = torch.arange(5, 45).reshape(2, 20)


def opened(folder: Path, *settings: str) -> Session:
    recipe = small(folder, *settings)
    return open_session(recipe, prepare(recipe, Silent()), RunDir(folder), Silent())


def test_loraplus_sets_the_rate_of_b_and_leaves_the_embedding_at_that_of_a(tmp_path: Path) -> None:
    trainer = opened(tmp_path, "adapter.loraplus_lr_ratio=8", "training.weight_decay=0.01").trainer
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert set(rates) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        assert rate == pytest.approx(1.6e-2 if ".lora_B." in name else 2e-3), name
    assert any("lora_embedding_A" in name for name in rates)
    assert {g["weight_decay"] for g in trainer.optimizer.param_groups if g["params"]} == {0.01}


def test_neftune_adds_noise_in_training_and_to_no_measurement(tmp_path: Path) -> None:
    session = opened(tmp_path, "training.neftune_noise_alpha=5", "training.max_steps=1", "adapter.lora_dropout=0")
    model, seen = session.model, {}

    def look(*_: Any, **__: Any) -> None:
        with torch.no_grad():
            seen["training"] = [model.train()(input_ids=IDS).logits for _ in range(2)]
            with as_base(model):
                seen["base"] = [model(input_ids=IDS).logits for _ in range(2)]
            seen["measured"] = [model.eval()(input_ids=IDS).logits for _ in range(2)]
        model.train()

    session.trainer.callback_handler.callbacks[0].on_step_end = look
    with quiet():
        session.fit(None)
    assert not torch.equal(*seen["training"])
    assert torch.equal(*seen["measured"])
    assert torch.equal(*seen["base"])
    with torch.no_grad():
        assert torch.equal(model.train()(input_ids=IDS).logits, model(input_ids=IDS).logits)  # and the hook is gone


def test_eva_shares_its_ranks_out_and_switches_nothing_on(tmp_path: Path) -> None:
    session = opened(tmp_path, "adapter.method=eva", "adapter.embeddings=false", "adapter.lora_dropout=0")
    model = session.model.eval()
    config = model.peft_config["default"]
    rows = [p for name, p in model.named_parameters() if "lora_A" in name]
    assert sum(len(p) for p in rows) == 4 * 7 * model.config.num_hidden_layers
    assert len({len(p) for p in rows}) > 1 and config.rank_pattern
    assert config.init_lora_weights is True and config.eva_config is None
    for p in rows:
        assert torch.allclose(p @ p.T, torch.eye(len(p)), atol=1e-4)  # directions, which kaiming's draws are not
    with torch.no_grad():
        on = model(input_ids=IDS).logits
        with model.disable_adapter():
            assert torch.equal(on, model(input_ids=IDS).logits)


def test_what_is_trained_whole_over_a_16_bit_base_is_kept_in_float32(tmp_path: Path) -> None:
    whole = ("adapter.embeddings=false", "adapter.modules_to_save=[lm_head, norm, embed_tokens]")
    base = make_base(tmp_path / "base")
    settings = (f"base.model={base}", "base.compute_dtype=bfloat16", "training.max_steps=2", *whole)
    run = train(small(tmp_path, *settings), root=tmp_path / "runs", reporter=Silent())
    saved = load_file(run.adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in saved.items() if "lora" not in name}
    assert {name.split(".")[-2] for name in kept} >= {"lm_head", "norm", "embed_tokens"}
    assert all(tensor.dtype == torch.float32 for tensor in kept.values())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in kept.values())
    parts = open_parts(run)
    model, _ = load_model(parts)
    opened = dict(model.named_parameters())
    for name, tensor in kept.items():
        assert torch.equal(opened[name.replace(".weight", ".modules_to_save.default.weight")], tensor), name
    questions = [row.prompt for row in held_out_rows(parts).rows]
    found = label_probabilities(model, parts.renderer, questions, parts.labels, batch_size=4)
    lines = run.read_lines("predictions.jsonl")
    assert np.allclose(found, [[line["adapter"][label] for label in parts.labels] for line in lines], atol=1e-5)
    with torch.no_grad(), model.disable_adapter():
        stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
        assert torch.equal(model(input_ids=IDS).logits, stock(input_ids=IDS).logits)
    both, names, _ = load_members([parts, parts])
    add_combined(both, names, Combination("linear", (0.5, 0.5)), name="combined")
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        for name in (*names, "combined"):
            both.set_adapter(name)
            assert torch.allclose(both(input_ids=IDS).logits, wanted, atol=0.05), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (False, ("adapter.embeddings=false", "adapter.modules_to_save=[lm_head]")),
        (True, ("adapter.embeddings=false", "adapter.modules_to_save=[lm_head]")),
        (True, ("adapter.method=ia3", "adapter.r=16", *NOT_IA3, "adapter.modules_to_save=[embed_tokens]")),
        (True, ("adapter.method=dora",)),
        (True, ("adapter.rank_pattern={q_proj: 2}", "adapter.alpha_pattern={down_proj: 64}")),
    ],
    ids=["head", "tied-head", "ia3-embedding", "dora-embedding", "patterns"],
)
def test_what_is_trained_whole_is_saved_and_merged(tmp_path: Path, tied: bool, settings: tuple[str, ...]) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    recipe = small(tmp_path, f"base.model={base}", "training.max_steps=2", "training.learning_rate=1e-2", *settings)
    run = train(recipe, root=tmp_path / "runs", reporter=Silent())
    ours, _ = load_model(open_parts(run))
    merged = merge(open_parts(run), output=tmp_path / "merged", dtype="float32", reporter=Silent())
    with torch.no_grad(), quiet():
        expected = ours(input_ids=IDS).logits
        stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        untrained = stock(input_ids=IDS).logits
        found = PeftModel.from_pretrained(stock, run.adapter).eval()(input_ids=IDS).logits
        again = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32)(input_ids=IDS).logits
    assert (expected - untrained).abs().max() > 1e-2
    assert (expected - found).abs().max() < 1e-4
    assert (expected - again).abs().max() < 2e-4
