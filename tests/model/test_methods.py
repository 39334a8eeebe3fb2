"""How adapters of the other methods begin, what they learn by, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from ift_peft.errors import Faults, IftPeftError, ModelError
from ift_peft.model.adapter import check_adapter, peft_config
from ift_peft.model.base import load_base
from ift_peft.model.configuration import skeleton
from ift_peft.model.initialise import base_weight, begin_with_base, begin_with_residual, freeze_second_half
from ift_peft.model.reach import reach
from ift_peft.model.tokenizer import locate_base
from ift_peft.sections import Adapter
from ift_peft.train.allocation import RankAllocation, orthogonality
from tests.train.small import small

TINY = locate_base("tiny")
NARROW = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
IDS = torch.arange(5, 45).reshape(2, 20)


def plain(**settings: Any) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 12, "target_modules": ("q_proj", "down_proj"), **settings}


def laid(adapter: Adapter, quantization: Any = "none") -> Any:
    base = load_base(TINY, quantization=quantization, device="cpu").model
    torch.manual_seed(0)
    return get_peft_model(base, peft_config(adapter, base, base_name=str(TINY.folder), revision=None))


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern")  # of converting theirs later
@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_start_taken_away_is_that_of_peft_and_learns_by_the_same_gradients(method: str, use_rslora: bool) -> None:
    adapter = Adapter(method=method, use_rslora=use_rslora, rank_pattern={"q_proj": 6}, **plain())
    ours = laid(adapter)
    untouched = ours.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().weight.clone()
    begin_with_base(ours, adapter)
    assert freeze_second_half(ours) == sum(p.numel() for p in ours.parameters() if p.requires_grad) // 2
    config = LoraConfig(
        init_lora_weights=method, use_rslora=use_rslora, rank_pattern={"q_proj": 6}, task_type="CAUSAL_LM", **plain()
    )
    bare = AutoModelForCausalLM.from_pretrained(TINY.folder, dtype=torch.float32)
    theirs = get_peft_model(bare, config)
    losses = [model(input_ids=IDS, labels=IDS).loss for model in (ours, theirs)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-4)
    for loss in losses:
        loss.backward()
    named = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        dimension = 0 if "lora_A" in name else 1
        gradient, rank = named[name].grad, parameter.shape[dimension]
        first, second = gradient.split(rank, dim=dimension)
        assert torch.allclose(first, parameter.grad, rtol=1e-2, atol=1e-5)
        assert first.abs().max() > 0 and not second.any()
    layer = ours.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer()
    assert torch.equal(layer.weight, untouched)


def test_loftq_begins_with_the_best_that_its_rank_can_make_up_for() -> None:
    model = laid(Adapter(method="loftq", **plain()), "nf4")
    full = load_base(TINY, device="cpu").model
    begin_with_residual(model, full)
    module = model.get_base_model().model.layers[1].mlp.down_proj
    lost = base_weight(full.model.layers[1].mlp.down_proj) - base_weight(module.get_base_layer())
    left = lost - module.get_delta_weight("default").detach()
    best = torch.linalg.svdvals(lost.double())[4:].square().sum().sqrt()
    assert float(left.norm()) == pytest.approx(float(best), rel=1e-4)
    assert left.norm() < 0.99 * lost.norm()


def test_adaloras_penalty_is_pefts_and_its_ranks_end_at_r() -> None:
    model = laid(Adapter(method="adalora", **plain()))
    with torch.no_grad():
        with_penalty = model.train()(input_ids=IDS, labels=IDS).loss
        without = model.get_base_model()(input_ids=IDS, labels=IDS).loss
        penalty = orthogonality(model)
    assert float(with_penalty - without) == pytest.approx(0.5 * float(penalty), rel=1e-4)
    allocation, optimizer = RankAllocation(model), torch.optim.SGD(model.parameters(), lr=0.1)
    state = type("State", (), {"max_steps": 5, "global_step": 0})()
    allocation.on_train_begin(None, state, None)  # type: ignore[arg-type]
    ranks = []
    for state.global_step in range(5):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        allocation.on_optimizer_step(None, state, None)  # type: ignore[arg-type]
        ranks.append(sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name))
    modules = 2 * model.config.num_hidden_layers
    assert ranks == sorted(ranks, reverse=True) and ranks[0] > ranks[-1] == 4 * modules
    assert model.peft_config["default"].rank_pattern is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("adapter.method=pisa",), "adapter.method"),
        (("adapter.method=ia3", "adapter.r=4"), r"r left at 16 with ia3 \(it has no rank\)"),
        (("adapter.method=vera", "adapter.embeddings=true"), "embeddings left at False with vera"),
        (("adapter.method=vera", "adapter.lora_alpha=8"), "lora_alpha left at 32 with vera"),
        (("adapter.method=pissa", "adapter.lora_dropout=0.1"), "lora_dropout left at 0.0 with pissa"),
        (("adapter.method=pissa", "training.weight_decay=0.1"), "weight_decay=0"),
        (("adapter.method=loftq",), "loftq begins as what 4 bits took"),
        (("adapter.method=loftq", "base.quantization=int8"), "loftq begins as what 4 bits took"),
        (("adapter.method=dora", "base.quantization=int8"), "scales of int8"),
        (("adapter.method=adalora", "adapter.init_r=4"), "init_r above r"),
        (("adapter.method=adalora", "adapter.tinit=6", "adapter.tfinal=6"), "tinit and adapter.tfinal"),
        (("adapter.method=adalora", "adapter.loraplus_lr_ratio=4"), "loraplus_lr_ratio left at None"),
        (("adapter.method=vera", "adapter.bias=all"), "bias left at 'none' with vera"),
        (("adapter.eva_rho=3",), "eva_rho left at 2.0 with lora"),
        (("adapter.loraplus_lr_ratio=0.5",), "loraplus_lr_ratio"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    rank = () if "adapter.method=ia3" in settings else ("adapter.r=4",)
    with pytest.raises(IftPeftError, match=message):
        small(tmp_path, "adapter.lora_dropout=0", "adapter.embeddings=false", *rank, *settings)


def test_all_that_cannot_work_is_told_at_once(tmp_path: Path) -> None:
    wrong = ("adapter.method=loftq", "adapter.eva_rho=3", "adapter.loraplus_lr_ratio=2", "training.optim=lomo")
    with pytest.raises(Faults) as raised:
        small(tmp_path, *wrong, "base.quantization=int8", "training.learning_rte=1")
    told = str(raised.value)
    for part in ("loftq begins", "eva_rho left", "embeddings left", "takes groups of weights", "learning_rte"):
        assert part in told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"qproj": 4}}, "'qproj', which matches none"),
        ({"alpha_pattern": {"gate_proj": 4.0}}, "'gate_proj', which matches none"),
        ({"modules_to_save": ("lm_hat",)}, "no module of that ending"),
        ({"modules_to_save": ("q_proj",)}, "take it out of adapter.target_modules"),
        ({"modules_to_save": ("embed_tokens",), "embeddings": True}, "which the adapter is laid over"),
        ({"method": "pissa", "r": 500}, "a rank of at most 192"),
        ({"method": "eva", "r": 100}, "200, 100 times eva_rho"),
        ({"method": "ia3", "r": 16, "lora_alpha": 32, "feedforward_modules": ("down_proj",)}, None),
    ],
)
def test_what_the_base_does_not_have_is_refused(settings: dict[str, Any], message: str | None) -> None:
    adapter, bare = Adapter(**plain(**settings)), skeleton(TINY)
    if message is None:
        check_adapter(adapter, bare)
        return
    with pytest.raises(IftPeftError, match=message):
        check_adapter(adapter, bare)


@pytest.mark.parametrize("method", ["pissa", "olora", "loftq", "eva"])
def test_what_begins_as_directions_of_linear_modules_is_refused_on_experts(method: str) -> None:
    def bare() -> MixtralForCausalLM:
        with torch.device("meta"):
            model = MixtralForCausalLM(MixtralConfig(**NARROW, num_local_experts=2, num_experts_per_tok=1))
        model.name_or_path = "base"
        return model

    with pytest.raises(ModelError, match=rf"{method}.*\n.*experts and routers.*mlp[.]experts.*\n.*target_modules"):
        reach(bare(), Adapter(method=method, r=4))
    notes = reach(bare(), Adapter(method=method, r=4, target_modules=("q_proj", "v_proj")))
    assert [note for note in notes if "adapted as parameters" in note] == []


def test_packed_weights_are_not_trained_whole_and_ia3_asks_where_peft_knows_nothing() -> None:
    bare = skeleton(TINY)
    check_adapter(Adapter(**plain(modules_to_save=("gate_proj",))), bare)
    with pytest.raises(ModelError, match="quantised to nf4"):
        check_adapter(Adapter(**plain(modules_to_save=("gate_proj",))), bare, quantization="nf4")
    check_adapter(Adapter(**plain(modules_to_save=("lm_head",))), bare, quantization="nf4")
    unknown = LlamaForCausalLM(LlamaConfig(**NARROW))
    unknown.config.model_type = "olmo"
    with pytest.raises(ModelError, match="feedforward_modules"):
        check_adapter(Adapter(method="ia3"), unknown)
    check_adapter(Adapter(method="ia3", feedforward_modules=()), unknown)
