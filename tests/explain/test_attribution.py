from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ift_peft.data.render import Rendered
from ift_peft.explain.attribution import METHODS, Method, attribute, kept_tokens
from ift_peft.explain.explanation import explain
from ift_peft.explain.pieces import Piece, prompt_pieces
from ift_peft.explain.score import AnswerScore, answer_score
from ift_peft.infer.likelihood import answer_likelihoods, label_probabilities
from ift_peft.infer.load import Parts, held_out_rows
from tests.explain.conftest import CUES, QUERY

pytestmark = pytest.mark.slow


def texts(parts: Parts, count: int) -> list[str]:
    return [row.text or "" for row in held_out_rows(parts).rows[:count]]


@pytest.mark.parametrize("adapter", [True, False])
def test_the_score_is_the_log_odds_of_what_predict_gives(model: Any, parts: Parts, adapter: bool) -> None:
    for text in (QUERY, "床单很干净。"):
        one = explain(model, parts, text, method="occlusion", answer="正面")
        with nullcontext() if adapter else model.disable_adapter():
            (row,) = label_probabilities(model, parts.renderer, [parts.ask(text).messages], parts.labels, batch_size=2)
        score = (one.adapter if adapter else one.base).score
        assert score == pytest.approx(np.log(row[1] / row[0]), abs=1e-3)
        assert one.probabilities is not None
        assert one.probabilities[0 if adapter else 1] == pytest.approx(row[1], abs=1e-4)


def test_one_answer_alone_is_scored_by_its_log_likelihood(model: Any, parts: Parts) -> None:
    prompt = parts.ask(QUERY).messages
    row = parts.renderer.render([(*prompt, {"role": "assistant", "content": "quite good, 不错"})])[0]
    ids = parts.renderer.prompts([prompt])[0]
    (expected,) = answer_likelihoods(model, [row], batch_size=1, pad_token_id=parts.tokenizer.pad_token_id)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.tensor([ids]))
        found = answer_score(ids, [row], chosen=0)(model, embedded, torch.ones(1, len(ids), dtype=torch.bool))
    assert float(found) == pytest.approx(expected.log_probability, abs=1e-3)


def test_a_token_taken_out_leaves_the_prompt_without_it_and_has_no_gradient(model: Any, parts: Parts) -> None:
    prompt = parts.ask(QUERY).messages
    rendered = parts.renderer.render([(*prompt, {"role": "assistant", "content": label}) for label in parts.labels])
    ids = torch.tensor(parts.renderer.prompts([prompt]))
    score = answer_score(ids[0].tolist(), rendered, chosen=1)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    kept = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    found = score(model, embedded, kept)
    shorter = embedded[:, kept[0]]
    plain = score(model, shorter, torch.ones(shorter.shape[:2], dtype=torch.bool))
    assert found.item() == pytest.approx(plain.item(), abs=1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), embedded)
    assert torch.equal(gradient[~kept], torch.zeros_like(gradient[~kept]))
    assert bool((gradient[kept].abs().sum(dim=-1) > 0).all())


def test_occlusion_is_the_difference_to_the_text_without_the_word(model: Any, parts: Parts) -> None:
    one = explain(model, parts, QUERY, method="occlusion")
    number = next(n for n, piece in enumerate(one.pieces) if piece.text == " great")
    without = explain(model, parts, QUERY.replace(" great", ""), method="occlusion", answer=one.answer)
    assert one.adapter.values[number] == pytest.approx(one.adapter.score - without.adapter.score, abs=1e-3)
    assert one.base.values[number] == pytest.approx(one.base.score - without.base.score, abs=1e-3)


def test_integrated_gradients_add_up_and_too_few_steps_do_not(model: Any, parts: Parts) -> None:
    for text in texts(parts, 2):
        fine = explain(model, parts, text, method="integrated-gradients", steps=160)
        for found in (fine.adapter, fine.base):
            assert found.baseline is not None and found.delta is not None
            change = found.score - found.baseline
            assert sum(found.values) == pytest.approx(change, abs=0.01 * max(1.0, abs(change)))
        coarse = explain(model, parts, text, method="integrated-gradients", steps=2)
        assert coarse.adapter.delta is not None and fine.adapter.delta is not None
        assert abs(coarse.adapter.delta) > 10 * abs(fine.adapter.delta)
        assert coarse.adapter.baseline == fine.adapter.baseline


@pytest.mark.parametrize("method", METHODS)
def test_attributions_do_not_depend_on_batching(model: Any, parts: Parts, method: Method) -> None:
    one, other = (explain(model, parts, QUERY, method=method, steps=10, batch_size=size) for size in (1, 7))
    assert one.adapter.values == pytest.approx(other.adapter.values, abs=1e-3)
    assert one.base.values == pytest.approx(other.base.values, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_template_has_no_part_in_it(model: Any, parts: Parts, method: Method) -> None:
    one = explain(model, parts, QUERY, method=method, steps=4)
    template = [value for piece, value in zip(one.pieces, one.adapter.values, strict=True) if piece.kind == "template"]
    assert template == [0.0] * 3


def test_tokens_that_no_attention_reaches_carry_nothing() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("mistral", **sizes, num_key_value_heads=2, vocab_size=50, sliding_window=4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    pieces = [Piece(str(n), "text", n, n + 1) for n in range(20)]
    score = AnswerScore((Rendered([7], [7]), Rendered([8], [8])), 0)
    found = attribute(model, score, list(range(20, 40)), pieces, method="integrated-gradients", pad_token_id=0)
    reached = 2 * (4 - 1)  # layers times the window before a position
    assert found.values[: 20 - reached - 1] == (0.0,) * (20 - reached - 1)
    assert all(found.values[20 - reached - 1 :])


@pytest.mark.parametrize("method", METHODS)
def test_taking_out_the_strongest_pieces_costs_more_than_taking_out_others(
    model: Any, parts: Parts, method: Method
) -> None:
    """The deletion test: 20 held-out texts, 12 random draws of as many pieces for each."""
    rng = random.Random(0)
    margins, found = [], 0
    for row in held_out_rows(parts).rows[:20]:
        prompt, pieces = prompt_pieces(parts.renderer, row.prompt, row.text)
        rendered = parts.renderer.render([(*row.prompt, {"role": "assistant", "content": w}) for w in parts.labels])
        score = answer_score(prompt.ids, rendered, chosen=parts.labels.index(row.answer))
        values = attribute(model, score, prompt.ids, pieces, method=method, pad_token_id=0, steps=12).values
        ranked = sorted(range(len(pieces)), key=lambda number: -values[number])
        own = [number for number in ranked if pieces[number].kind == "text"]
        found += pieces[own[0]].text.strip() in CUES[row.answer]
        removed = [own[:count] for count in (1, 2)]
        removed += [rng.sample(own, count) for count in (1, 2) for _ in range(12)]
        present = torch.ones(len(removed), len(pieces))
        for line, numbers in enumerate(removed):
            present[line, numbers] = 0
        with torch.no_grad():
            embedded = model.get_input_embeddings()(torch.tensor([prompt.ids])).expand(len(removed), -1, -1)
            scores = score(model, embedded, kept_tokens(pieces, present))
        margins += [float(scores[2:14].mean() - scores[0]), float(scores[14:].mean() - scores[1])]
    spread = float(np.std(margins)) / len(margins) ** 0.5
    assert np.mean(margins) - 4 * spread > 1.0  # nats
    assert found >= 14  # the one word in seven that decides is ranked first


def test_a_run_without_labels_explains_the_answer_it_generates(model: Any, parts: Parts) -> None:
    free = replace(
        parts, recipe=parts.recipe.model_copy(update={"data": parts.recipe.data.model_copy(update={"labels": None})})
    )
    one = explain(model, free, QUERY, method="occlusion", max_new_tokens=4)
    assert (one.answer, one.score_name, one.probabilities) == ("正面", "log-likelihood", None)
    assert one.adapter.score <= 0
    assert one.pieces[one.strongest[0]].text == " great"
    other = explain(model, free, QUERY, method="occlusion", answer="负面")
    assert other.adapter.score < one.adapter.score
