from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ift_peft.data.render import IGNORE, Rendered
from ift_peft.explain.score import AnswerScore, log_likelihoods

VOCABULARY = 60
ANSWERS = [Rendered([5, 6, 7], [IGNORE, 6, 7]), Rendered([9], [9]), Rendered([5, 8], [5, 8])]
FAMILIES = ("llama", "qwen3", "gemma3_text", "mistral", "gpt2", "opt")


def small(family: str) -> torch.nn.Module:
    common: dict[str, int] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    if family == "gpt2":
        config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, n_positions=128, **common)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        extra = {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8} if family != "opt" else {"ffn_dim": 64}
        config = AutoConfig.for_model(family, **sizes, **extra, **common)
    torch.manual_seed(0)
    made: torch.nn.Module = AutoModelForCausalLM.from_config(config).eval()
    return made


def by_hand(model: torch.nn.Module, prompt: list[int], answer: Rendered) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer.input_ids])).logits[0, len(prompt) - 1 :].double()
    return sum(float(logits[at].log_softmax(-1)[label]) for at, label in enumerate(answer.labels) if label != IGNORE)


@pytest.mark.parametrize("family", FAMILIES)
def test_taken_out_tokens_leave_the_prompt_as_if_never_there(family: str) -> None:
    model = small(family)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, VOCABULARY, (4, 24), generator=generator)
    kept = torch.rand(ids.shape, generator=generator) > 0.4
    kept[0] = True
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    found = log_likelihoods(model, embedded, kept, ANSWERS)
    for row, present, values in zip(ids, kept, found.tolist(), strict=True):
        expected = [by_hand(model, row[present].tolist(), answer) for answer in ANSWERS]
        assert values == pytest.approx(expected, abs=1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), embedded)
    assert torch.equal(gradient[~kept], torch.zeros_like(gradient[~kept]))


def test_log_odds_are_against_all_others_together() -> None:
    model = small("llama")
    prompt = [11, 12, 13, 14]
    embedded = model.get_input_embeddings()(torch.tensor([prompt])).detach()  # type: ignore[operator]
    score = AnswerScore(tuple(ANSWERS), 1)
    with torch.no_grad():
        value = score(model, embedded, torch.ones(1, 4, dtype=torch.bool)).item()
    first, chosen, third = (by_hand(model, prompt, answer) for answer in ANSWERS)
    others = torch.tensor([first, third]).exp().sum().log().item()
    assert score.name == "log-odds"
    assert value == pytest.approx(chosen - others, abs=1e-4)
