"""GGUF files: weights and settings as they were trained, and in llama.cpp the same answers; a wrong file is caught."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from ift_peft.adapters.export import families
from ift_peft.adapters.export.families import Family, family_of
from ift_peft.adapters.export.gguf_file import About, write_adapter, write_model
from ift_peft.adapters.export.proof import BOUND, available, compare, running
from ift_peft.adapters.export.run import export
from ift_peft.adapters.export.vocabulary import vocabulary_of
from ift_peft.adapters.merge import merge
from ift_peft.errors import ExportError, IftPeftError
from ift_peft.infer.load import Parts, load_model, open_parts
from ift_peft.model.tokenizer import TINY
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir

pytestmark = pytest.mark.slow

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
quants = pytest.importorskip("gguf.quants")
in_llama_cpp = pytest.mark.skipif(
    not available(), reason="not run in llama.cpp: needs the extra gguf-proof (llama-cpp-python)"
)
ABOUT = About("small", "A small model.", "tiny", None, "apache-2.0", "small")
SMALL = {
    "vocab_size": 8192,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def parts(two: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A run with rsLoRA, its merge beside it."""
    folder = tmp_path_factory.mktemp("gguf") / two.path.name
    shutil.copytree(two.path, folder)
    found = open_parts(RunDir(folder))
    merge(found, output=folder / "merged", dtype="float32", reporter=Silent())
    return found


def written(folder: Path, path: Path, outtype: Any = "f32") -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    vocabulary = vocabulary_of(tokenizer, size=8192, end_token_id=4)
    template = "{{ messages[0].content }}"
    return write_model(
        folder, path, vocabulary=vocabulary, template=template, outtype=outtype, about=ABOUT, reporter=Silent()
    )


def tensors(path: Path) -> dict[str, Any]:
    return {one.name: one for one in gguf.GGUFReader(path).tensors}


def test_weights_and_settings_are_those_of_the_model(parts: Parts, tmp_path: Path) -> None:
    assert written(parts.run.path / "merged", tmp_path / "m.gguf") == []
    weights = load_file(parts.run.path / "merged/model.safetensors")
    found = tensors(tmp_path / "m.gguf")
    assert len(found) == len(weights)
    down = torch.from_numpy(found["blk.3.ffn_down.weight"].data.copy())
    assert torch.equal(down, weights["model.layers.3.mlp.down_proj.weight"])
    # llama.cpp rotates neighbours: row 2i of a head is its row i, row 2i + 1 its row i + half.
    query = torch.from_numpy(found["blk.1.attn_q.weight"].data.copy()).reshape(6, 16, 2, 192)
    plain = weights["model.layers.1.self_attn.q_proj.weight"].reshape(6, 2, 16, 192)
    assert torch.equal(query[:, :, 0], plain[:, 0]) and torch.equal(query[:, :, 1], plain[:, 1])
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    said = {name: fields[name].contents() for name in fields if not name.startswith("tokenizer.ggml.t")}
    assert said["general.architecture"] == "llama" and said["general.license"] == "apache-2.0"
    assert said["llama.attention.head_count_kv"] == 6 and said["llama.context_length"] == 512
    assert said["tokenizer.ggml.eos_token_id"] == 4 and said["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize(("outtype", "most"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_smaller_types_are_as_near_as_their_bits_allow(outtype: str, most: float, parts: Parts, tmp_path: Path) -> None:
    written(parts.run.path / "merged", tmp_path / "m.gguf", outtype)
    weights = load_file(parts.run.path / "merged/model.safetensors")
    found = tensors(tmp_path / "m.gguf")["blk.0.ffn_up.weight"]
    unpacked = torch.from_numpy(quants.dequantize(found.data, found.tensor_type)).reshape(512, 192)
    wanted = weights["model.layers.0.mlp.up_proj.weight"]
    scale = wanted.abs() if outtype != "q8_0" else wanted.reshape(512, 6, 32).abs().amax(-1).repeat_interleave(32, 1)
    assert ((unpacked - wanted).abs() <= most * scale + 3e-8).all()
    assert tensors(tmp_path / "m.gguf")["output_norm.weight"].tensor_type.name == "F32"


def test_weights_too_large_for_float16_are_refused(parts: Parts, tmp_path: Path) -> None:
    shutil.copytree(parts.run.path / "merged", tmp_path / "merged")
    weights = load_file(tmp_path / "merged/model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(weights, tmp_path / "merged/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="as large as 1e") as raised:
        written(tmp_path / "merged", tmp_path / "m.gguf", "f16")
    assert "ffn_down" in str(raised.value) and "bf16" in str(raised.value)


def test_what_peft_scales_by_rank_is_folded_into_b(parts: Parts, tmp_path: Path) -> None:
    """rsLoRA at rank 6: llama.cpp scales each pair by alpha / rank, PEFT by alpha / sqrt(rank)."""
    how = write_adapter(parts, tmp_path / "lora.gguf", about=ABOUT, outtype="f32", reporter=Silent())
    found = tensors(tmp_path / "lora.gguf")
    model, _ = load_model(parts, quantization="none", compute_dtype="float32")
    assert how["pairs_with_scaling_folded_into_b"] == how["pairs"] == len(found) // 2 == 4 * 7 + 1
    a, b = (torch.from_numpy(found[f"blk.0.ffn_up.weight.lora_{name}"].data.copy()) for name in "ab")
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert torch.allclose(how["alpha"] / a.shape[0] * b @ a, layer.get_delta_weight("default"), atol=1e-6)
    a, b = (torch.from_numpy(found[f"token_embd.weight.lora_{name}"].data.copy()) for name in "ab")
    embedding = model.get_submodule("base_model.model.model.embed_tokens")
    delta = how["alpha"] / b.shape[1] * a @ b.T
    assert torch.allclose(delta, embedding.get_delta_weight("default"), atol=1e-6)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (AutoConfig.for_model("gpt2"), "gpt2"),
        (LlamaConfig(**SMALL, hidden_act="gelu"), "hidden_act"),
        (LlamaConfig(**SMALL, attention_bias=True), "attention_bias"),
        (LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "rope_type"),
        (MistralConfig(**SMALL, sliding_window=64), "sliding_window"),
    ],
)
def test_families_and_settings_that_are_not_proved_are_refused(config: PretrainedConfig, named: str) -> None:
    with pytest.raises(IftPeftError) as raised:
        family_of(config)
    assert named in str(raised.value) and "--to merged" in str(raised.value)


@in_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, head_dim=32, tie_word_embeddings=True),
        LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE),
        MistralConfig(**SMALL, sliding_window=None),
        Qwen2Config(**SMALL),
        Qwen3Config(**SMALL, head_dim=32),
    ],
    ids=("llama, tied, wide heads", "llama 3", "mistral", "qwen2", "qwen3"),
)
def test_every_known_family_answers_the_same_in_llama_cpp(config: PretrainedConfig, tmp_path: Path) -> None:
    """Grouped heads, random weights and biases; logits at every position of 24 greedy tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    model.save_pretrained(tmp_path / "model")
    written(tmp_path / "model", tmp_path / "model.gguf")
    with running(tmp_path / "model.gguf", room=128) as llama:
        found = compare(llama, model, [2, *range(100, 170), 4, 3], end=4, most=24)
    assert found.difference < BOUND["f32"]
    assert found.equal == found.tokens


@in_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("to", ["gguf", "gguf-adapter"])
def test_llama_cpp_answers_as_the_run_does(to: Any, parts: Parts, tmp_path: Path) -> None:
    proof = export(parts, to=to, outtype="f32", output=tmp_path / "out", reporter=Silent()).checked["proof"]
    assert proof["prompts_equal"] == proof["prompts"] and proof["tokens_equal"] == proof["tokens"]
    assert proof["max_logit_difference"] < BOUND["f32"]
    assert "greedy answers are the model's own" in (tmp_path / "out/README.md").read_text("utf-8")


@in_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("to", ["gguf", "gguf-adapter"])
@pytest.mark.parametrize("fault", ["rows not rearranged", "scaling dropped"])
def test_a_wrong_file_is_caught_and_leaves_nothing(
    fault: str, to: Any, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "rows not rearranged":
        monkeypatch.setattr(families.Family, "arranged", lambda self, key, rows: rows)
    else:
        arranged = Family.arranged
        wrong = 3.0
        monkeypatch.setattr(
            families.Family,
            "arranged",
            lambda self, key, rows: arranged(self, key, rows) * (wrong if "up_proj" in key else 1.0),
        )
    with pytest.raises(ExportError, match=r"within 0\.001 of the model's"):
        export(parts, to=to, outtype="f32", output=tmp_path / "out", reporter=Silent())
    assert not list(tmp_path.iterdir())
