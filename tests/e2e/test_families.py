"""Random models of the families that people use: train, save, open, predict, merge; and what is refused, by name.

What a run answers is compared with the merged folder as stock transformers loads it, asked one row at a time without
padding and without a cache: wrong positions, masks, windows, ties or layouts show as other logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CodeGenConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ift_peft.adapters.merge import merge
from ift_peft.errors import ModelError
from ift_peft.infer.generation import generate_all
from ift_peft.infer.likelihood import label_probabilities
from ift_peft.infer.load import Parts, load_model, open_parts
from ift_peft.infer.predict import answer_all
from ift_peft.model.quiet import quiet
from ift_peft.model.tokenizer import TINY
from ift_peft.recipe import load_recipe
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.train.run import train

NUMBERS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "six": "sechs"}
TOKENIZER = AutoTokenizer.from_pretrained(TINY)
SHORT = {
    "vocab_size": len(TOKENIZER),
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
}
LAYERS = {**SHORT, "hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.2}
GROUPED = {**LAYERS, "num_key_value_heads": 2}  # heads of keys and values
NARROW = {**GROUPED, "head_dim": 8}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

Make = Callable[[], PreTrainedConfig]
FAMILIES: dict[str, Make] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen3, tied": lambda: Qwen3Config(**NARROW, tie_word_embeddings=True),
    "gemma 3, tied, a window": lambda: Gemma3TextConfig(**NARROW, **WINDOW, final_logit_softcapping=3.0),
    "gemma 3 that also sees": lambda: Gemma3Config(
        text_config=Gemma3TextConfig(**NARROW, **WINDOW).to_dict(),
        vision_config={**EYE, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    ),
    "mistral, a window": lambda: MistralConfig(**NARROW, sliding_window=8),
    "phi-3, fused": lambda: Phi3Config(**GROUPED),
    "gpt-2, transposed, tied, learnt positions": lambda: GPT2Config(
        **{**SHORT, "n_embd": 32, "n_positions": 256}, initializer_range=0.2
    ),
    "gpt-neox, fused, parallel": lambda: GPTNeoXConfig(**LAYERS),
    "opt, positions from 2": lambda: OPTConfig(
        **SHORT, hidden_size=32, ffn_dim=64, word_embed_proj_dim=32, init_std=0.2
    ),
    "qwen3 of experts": lambda: Qwen3MoeConfig(**NARROW, **EXPERTS, mlp_only_layers=[0]),
    "gpt-oss": lambda: GptOssConfig(**NARROW, **WINDOW, num_local_experts=4, num_experts_per_tok=2),
}
WITHOUT_PADDING = ("llama", "mistral", "gpt-2")
EXPERTS_ARE = {
    "qwen3 of experts": (
        "adapted as parameters, being no linear modules: model.layers.*.mlp.experts.down_proj, "
        "model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.gate.weight",
        "not adapted, as PEFT takes their names for those of experts: model.layers.*.mlp.down_proj, "
        "model.layers.*.mlp.gate_proj, model.layers.*.mlp.up_proj",
    ),
    "gpt-oss": (
        "not adapted, as PEFT reaches linear modules only: model.layers.*.mlp.experts.down_proj, "
        "model.layers.*.mlp.experts.gate_up_proj",
    ),
}


def write_base(folder: Path, config: PreTrainedConfig, *, padding: bool = True) -> Path:
    torch.manual_seed(0)
    with quiet():
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder)
    if model.generation_config is not None:
        (folder / "generation_config.json").unlink(missing_ok=True)
    TOKENIZER.save_pretrained(folder)
    if not padding:
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text("utf-8"))
        del settings["pad_token"]
        path.write_text(json.dumps(settings), "utf-8")
    return folder


def trained(folder: Path, base: Path, *overrides: str, labels: bool = False) -> RunDir:
    name, answer = ("text", "label") if labels else ("prompt", "completion")
    rows = [
        {name: f"{word} and {other}?", answer: "same" if labels and word == other else "other" if labels else number}
        for word, number in NUMBERS.items()
        for other in (word, "ten")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "family.yaml").write_text(
        f"base: {{model: {base}, device: cpu}}\nadapter: {{r: 4}}\n"
        f"data: {{train: rows.jsonl, test_size: 4{', labels: [same, other]' if labels else ''}}}\n"
        "training: {max_steps: 3, learning_rate: 1.0e-2, per_device_train_batch_size: 4}\n"
        "evaluation: {forgetting: false, bootstrap_samples: 100}\n",
        "utf-8",
    )
    return train(load_recipe(str(folder / "family.yaml"), overrides), root=folder / "runs", reporter=Silent())


def greedy(stock: Any, ids: list[int], end: int, most: int) -> list[int]:
    """Token by token, each from the whole text before it."""
    for _ in range(most):
        ids = [*ids, int(stock(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == end:
            break
    return ids


def probabilities(stock: Any, parts: Parts, prompt: Any, labels: tuple[str, ...]) -> list[float]:
    rows = parts.renderer.render([(*prompt, {"role": "assistant", "content": label}) for label in labels])
    logs = []
    for row in rows:
        predicted = stock(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
        answer = range(row.prompt_length, len(row.input_ids))
        logs.append(sum(float(predicted[at - 1, row.labels[at]]) for at in answer))
    return torch.tensor(logs).double().softmax(0).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "quantization"),
    [(family, "none") for family in FAMILIES]
    + [(family, "nf4") for family in FAMILIES if family.startswith(("llama", "qwen3", "gpt-2"))],
)
@torch.no_grad()
def test_a_family_trains_predicts_and_merges(family: str, quantization: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", FAMILIES[family](), padding=not family.startswith(WITHOUT_PADDING))
    with torch.enable_grad():
        run = trained(tmp_path, base, f"base.quantization={quantization}")
    notes = run.read("manifest.json")["notes"]
    assert tuple(note for note in notes if "adapted" in note) == EXPERTS_ARE.get(family, ())
    assert any("experts stay as they are" in note for note in notes) == (quantization + family == "nf4qwen3 of experts")

    parts = open_parts(run)
    model, _ = load_model(parts)
    result = merge(parts, output=tmp_path / "merged", dtype="float32", reporter=Silent())
    assert result.max_logit_difference < 1e-4
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()

    prompts = [parts.ask(text).messages for text in ("one and seven?", "ten?", "six and a half and two and ten?")]
    ids = parts.renderer.prompts(prompts)
    for prompt in ids:
        ours, merged = (one(input_ids=torch.tensor([prompt])).logits for one in (model, stock))
        assert (ours - merged).abs().max() < 1e-4
        with model.disable_adapter():
            assert (ours - model(input_ids=torch.tensor([prompt])).logits).abs().max() > 0.1, "training changed it"

    written = [text for (text,) in generate_all(model, parts.renderer, prompts, max_new_tokens=5, batch_size=3)]
    end = parts.renderer.end_token_id
    by_hand = [greedy(stock, prompt, end, 5)[len(prompt) :] for prompt in ids]
    assert written == [parts.tokenizer.decode(one, skip_special_tokens=True).strip() for one in by_hand]
    (answer,) = answer_all(model, parts, [parts.ask("ten?")], max_new_tokens=5)
    assert answer.text == written[1]

    labels = ("eins", "zwei und drei", "vier")
    found = label_probabilities(model, parts.renderer, prompts, labels, batch_size=3)
    assert np.allclose(found, [probabilities(stock, parts, prompt, labels) for prompt in prompts], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3, tied", "gpt-2, transposed, tied, learnt positions"])
@torch.no_grad()
def test_a_family_learns_classes_with_a_head(family: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", FAMILIES[family](), padding=not family.startswith(WITHOUT_PADDING))
    with torch.enable_grad():
        run = trained(tmp_path, base, "base.head=sequence-classification", labels=True)
    parts = open_parts(run)
    model, _ = load_model(parts)
    merge(parts, output=tmp_path / "merged", dtype="float32", reporter=Silent())
    with quiet():
        stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    prompts = [parts.ask(text).messages for text in ("one and one?", "ten?", "six and ten?")]
    found = label_probabilities(model, parts.renderer, prompts, parts.labels, batch_size=3)
    for ids, row in zip(parts.renderer.prompts(prompts), found, strict=True):
        logits = stock(input_ids=torch.tensor([ids])).logits[0]
        named = dict(zip(stock.config.id2label.values(), logits.double().softmax(0).tolist(), strict=True))
        assert np.allclose(row, [named[label] for label in parts.labels], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "overrides", "told"),
    [
        (
            lambda: MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
            ["adapter.lora_dropout=0.1"],
            ["MixtralForCausalLM", "experts", "lora_dropout"],
        ),
        (FAMILIES["gpt-oss"], ["adapter.target_modules=[gate_up_proj]"], ["'gate_up_proj'", "q_proj"]),
        (
            FAMILIES["qwen3 of experts"],
            ["adapter.target_modules=[gate_proj]"],
            ["Qwen3MoeForCausalLM", "gate_proj", "up_proj", "fused"],
        ),
        (
            lambda: CodeGenConfig(**{**SHORT, "n_embd": 32, "n_positions": 256}, rotary_dim=4),
            ["base.head=sequence-classification", "data.labels=[eins, zwei, drei, vier, fünf, sechs]"],
            ["CodeGenConfig", "AutoModelForSequenceClassification"],
        ),
    ],
)
def test_what_a_family_cannot_do_is_refused_by_name_before_there_is_a_run(
    config: Make, overrides: list[str], told: list[str], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", config())
    with pytest.raises(ModelError) as caught:
        trained(tmp_path, base, *overrides)
    assert all(word in str(caught.value) for word in told), str(caught.value)
    assert not (tmp_path / "runs").exists()
