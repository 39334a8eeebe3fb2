from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ift_peft.data.render import IGNORE, Renderer
from ift_peft.data.row import ask
from ift_peft.infer.likelihood import answer_likelihoods, label_probabilities, pad, supervised_logits

TEXTS = ["很好", "The room was dirty and the staff rude, but breakfast was fine.", "屏幕三天就坏了，客服不理人。"]


def conversations(answers: list[str]) -> list[tuple[dict[str, str], ...]]:
    return [
        (*ask(text, instruction="请分类。", system=None), {"role": "assistant", "content": answer})
        for text, answer in zip(TEXTS, answers, strict=True)
    ]


def by_hand(model: torch.nn.Module, input_ids: list[int], labels: list[int]) -> float:
    with torch.no_grad():
        log_probs = model(torch.tensor([input_ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[i - 1, label]) for i, label in enumerate(labels) if label != IGNORE)


def test_likelihoods_do_not_depend_on_batching_and_equal_the_definition(
    model: torch.nn.Module, renderer: Renderer
) -> None:
    rows = renderer.render(conversations(["正面", "a rather longer answer", "负面"]))
    pad_token_id = renderer.tokenizer.pad_token_id
    batched = answer_likelihoods(model, rows, batch_size=3, pad_token_id=pad_token_id)
    single = answer_likelihoods(model, rows, batch_size=1, pad_token_id=pad_token_id)
    expected = [by_hand(model, row.input_ids, row.labels) for row in rows]
    assert [one.log_probability for one in batched] == pytest.approx(expected, abs=1e-4)
    assert [one.log_probability for one in single] == pytest.approx(expected, abs=1e-4)
    assert [one.tokens for one in batched] == [row.supervised for row in rows]


def test_the_head_sees_supervised_positions_only(model: torch.nn.Module, renderer: Renderer) -> None:
    rows = renderer.render(conversations(["正面", "正面", "负面"]))
    batch = pad(rows, renderer.tokenizer.pad_token_id)
    logits, targets, numbers = supervised_logits(model, batch)
    whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    mask = batch["labels"][:, 1:] != IGNORE
    assert torch.allclose(logits, whole[mask], atol=1e-5)
    assert torch.equal(targets, batch["labels"][:, 1:][mask])
    assert torch.equal(numbers, mask.nonzero()[:, 0])


def test_label_probabilities_are_normalised_likelihoods_of_labels_of_any_length(
    model: torch.nn.Module, renderer: Renderer
) -> None:
    labels = ["正面", "负面", "负面情绪较多"]
    prompts = [ask(text, instruction="请分类。", system=None) for text in TEXTS]
    probabilities = label_probabilities(model, renderer, prompts, labels, batch_size=4)
    logs = np.array(
        [
            [
                by_hand(model, row.input_ids, row.labels)
                for row in renderer.render([(*p, {"role": "assistant", "content": w}) for w in labels])
            ]
            for p in prompts
        ]
    )
    expected = np.exp(logs) / np.exp(logs).sum(axis=1, keepdims=True)
    assert probabilities.shape == (3, 3)
    assert probabilities == pytest.approx(expected, abs=1e-5)


def small(family: str, vocabulary: int) -> torch.nn.Module:
    """A randomly made model of another family, whose cache is of another kind."""
    common: dict[str, int] = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    torch.manual_seed(0)
    if family == "gpt2":
        config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=256, **common)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        extra = {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8} if family != "opt" else {"ffn_dim": 64}
        config = AutoConfig.for_model(family, **sizes, **extra, **common)
    made: torch.nn.Module = AutoModelForCausalLM.from_config(config).eval()
    return made


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mistral", "gpt2", "opt"])
def test_running_each_prompt_once_changes_no_probability(renderer: Renderer, family: str) -> None:
    labels = ["正面", "负面", "负面情绪较多", "正面情绪"]
    prompts = [ask(text, instruction="请分类。", system=None) for text in (*TEXTS, "一般" * 20)]
    other = small(family, len(renderer.tokenizer))
    found = label_probabilities(other, renderer, prompts, labels, batch_size=3)
    rendered = renderer.render([(*p, {"role": "assistant", "content": word}) for p in prompts for word in labels])
    logs = np.array([by_hand(other, row.input_ids, row.labels) for row in rendered]).reshape(len(prompts), -1)
    expected = np.exp(logs - logs.max(axis=1, keepdims=True))
    assert found == pytest.approx(expected / expected.sum(axis=1, keepdims=True), abs=1e-5)
