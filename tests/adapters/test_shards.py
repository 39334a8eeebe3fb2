"""Merging shard by shard: the numbers of PEFT's own merge_and_unload, in any layout, with two shards in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from ift_peft.adapters.checkpoint import INDEX, shard_files
from ift_peft.adapters.plan import plan_merge, why_in_memory
from ift_peft.adapters.shards import write_merged
from ift_peft.errors import Faults, MergeError
from ift_peft.model.heads import ClassHead
from ift_peft.model.quiet import quiet
from ift_peft.model.tokenizer import BaseLocation

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(2, 42).reshape(2, 20)


def llama(*, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied, initializer_range=0.2))


def gpt2() -> PreTrainedModel:
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    return GPT2LMHeadModel(config)


def planted(model: PreTrainedModel, folder: Path, **settings: Any) -> PeftModel:
    """An adapter on `model` with all its tensors drawn at random, saved to `folder`."""
    with quiet():
        adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 12, **settings}))
        torch.manual_seed(3)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


def merged(base: Path, adapter: Path, folder: Path, *, head: ClassHead | None = None, size: int | str = "5GB") -> Path:
    folder.mkdir()
    location = BaseLocation("base", base, None)
    assert why_in_memory(location, adapter, head=head) is None
    plan = plan_merge(location, adapter, head=head)
    write_merged(plan, folder, base=base, adapter=adapter, max_shard_size=size, progress=lambda done, total: None)
    return folder


MAKE = {
    "rslora with patterns": (
        llama,
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"up_proj": 5},
        },
    ),
    "dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "embedding dora": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tied embedding": (lambda: llama(tied=True), {"target_modules": ["embed_tokens", "v_proj"]}),
    "tied head trained whole": (
        lambda: llama(tied=True),
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    ),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", MAKE)
def test_merging_by_shards_is_what_peft_merges(kind: str, tmp_path: Path) -> None:
    make, settings = MAKE[kind]
    model = make()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(shard_files(tmp_path / "base")) > 2
    adapted = planted(model, tmp_path / "adapter", **settings)
    with torch.no_grad():
        expected = adapted(IDS).logits
        with adapted.disable_adapter():
            assert (adapted(IDS).logits - expected).abs().max() > 0.1, "the adapter changes something"
    folder = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", size="20KB")
    reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.allclose(reloaded(IDS).logits, expected, atol=1e-4)
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        if model.config.tie_word_embeddings:
            head = adapted.get_base_model().get_output_embeddings()
            if not hasattr(head, "modules_to_save"):
                head.weight = torch.nn.Parameter(head.weight.detach().clone())
        whole = adapted.merge_and_unload(safe_merge=True).state_dict()
    state = reloaded.state_dict()
    assert state.keys() == whole.keys()
    for name, weight in whole.items():
        assert torch.allclose(state[name], weight, rtol=1e-6, atol=1e-6), name


def test_a_tied_head_keeps_its_tie_where_the_adapter_leaves_the_embedding_alone(tmp_path: Path) -> None:
    model = llama(tied=True)
    model.save_pretrained(tmp_path / "base")
    planted(model, tmp_path / "adapter", target_modules=["v_proj"])
    folder = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert json.loads((folder / "config.json").read_text("utf-8"))["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_shards_hold_what_one_file_holds_in_the_layout_of_the_base(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="20KB")
    planted(model, tmp_path / "adapter", target_modules="all-linear")
    one = merged(tmp_path / "one", tmp_path / "adapter", tmp_path / "merged-one")
    several = merged(tmp_path / "several", tmp_path / "adapter", tmp_path / "merged-several", size="20KB")
    whole = load_file(one / "model.safetensors")
    parts = [load_file(file) for file in shard_files(several)]
    assert [len(part) for part in parts] == [len(load_file(file)) for file in shard_files(tmp_path / "several")]
    together = {name: tensor for part in parts for name, tensor in part.items()}
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], whole[name]) for name in whole)
    index = json.loads((several / INDEX).read_text("utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_a_classifier_takes_head_and_pooler_from_the_adapter(tmp_path: Path) -> None:
    """The base is a masked language model under old names: of it only the encoder is read."""
    torch.manual_seed(5)
    config = BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    masked = BertForMaskedLM(config)
    masked.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    old = {
        name.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
        if name.startswith("bert.")
    }
    save_file({**old, "cls.predictions.bias": tensors["cls.predictions.bias"]}, tmp_path / "base" / "model.safetensors")
    head = ClassHead(("a", "b", "c"), pad_token_id=0, seed=1)
    with quiet():
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **head.settings())
    adapted = planted(
        classifier,
        tmp_path / "adapter",
        target_modules=["query", "dense"],
        exclude_modules=["bert.pooler.dense"],
        modules_to_save=["classifier", "bert.pooler.dense"],
        task_type="SEQ_CLS",
    )
    folder = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", head=head)
    reloaded, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert reloaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    with torch.no_grad():
        assert torch.allclose(reloaded.eval()(IDS).logits, adapted(IDS).logits, atol=1e-5)


def test_every_fault_of_base_and_adapter_is_told_at_once(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    planted(model, tmp_path / "adapter", target_modules=["q_proj", "k_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    names = sorted(name for name in tensors if "layers.1" in name)
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = tensors[names[0]].clone()
    del tensors[names[1]]
    tensors[names[2]] = tensors[names[2]][:, :7].contiguous()
    save_file(tensors, file)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Faults) as caught:
        plan_merge(BaseLocation("base", tmp_path / "base", None), tmp_path / "adapter", head=None)
    assert len(caught.value.faults) == 4
    for name in ("layers.9.self_attn.q_proj", names[1], names[2], "model.norm.weight"):
        assert name in str(caught.value)


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    planted(model, tmp_path / "adapter", target_modules=["q_proj"])
    gone = shard_files(tmp_path / "base")[1]
    gone.unlink()
    with pytest.raises(MergeError, match=gone.name):
        plan_merge(BaseLocation("base", tmp_path / "base", None), tmp_path / "adapter", head=None)


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"trainable_token_indices": [1]}])
def test_what_peft_must_merge_in_memory_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    planted(model, tmp_path / "adapter", target_modules=["q_proj"], **settings)
    reason = why_in_memory(BaseLocation("base", tmp_path / "base", None), tmp_path / "adapter", head=None)
    assert reason is not None and next(iter(settings)) in reason


@pytest.mark.slow
def test_memory_holds_two_shards_whatever_the_base_weighs(tmp_path: Path) -> None:
    """A base of ten shards: a merge that held the model would need ten, and one that held both models twenty."""
    shard = 16 * 2**20  # bytes
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base", max_shard_size=shard)
    assert len(shard_files(tmp_path / "base")) >= 10
    planted(model, tmp_path / "adapter", target_modules="all-linear")
    script = Path(__file__).with_name("grow.py")
    arguments = [sys.executable, str(script), str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out")]
    done = subprocess.run([*arguments, str(shard)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)["grown"]
    assert shard < grown < 4 * shard, "two shards, what merging one weight takes, and the libraries' own"
