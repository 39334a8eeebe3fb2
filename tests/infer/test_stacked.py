"""Stacked adapters give the logits of stock PEFT, whatever else is in the batch or was in their slot."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, GPT2Config, LlamaConfig, OPTConfig

from ift_peft.errors import BusyError, Faults, ModelError
from ift_peft.infer.stacked import StackedAdapters
from ift_peft.model.quiet import quiet
from tests.infer.adapters import make_adapter, out_of_memory, random_base

VOCABULARY = 96
IDS = torch.randint(3, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(0))
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
GPT2 = GPT2Config(
    vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=1, eos_token_id=2
)
OPT = OPTConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    ffn_dim=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    word_embed_proj_dim=32,
    init_std=0.2,
)
FORMS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 16},
    {"r": 12, "lora_alpha": 6, "use_rslora": True},  # wider than what is stacked for the first
    {"r": 9, "rank_pattern": {"q_proj|c_attn": 3}, "alpha_pattern": {"q_proj|c_attn": 5}},
]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits.float()
    return found


@pytest.fixture
def base() -> Any:
    return random_base(LLAMA)


@pytest.mark.parametrize("config", [LLAMA, GPT2, OPT], ids=["llama", "gpt2", "opt"])
def test_each_row_gets_the_logits_of_its_adapter_in_stock_peft(config: Any, tmp_path: Path) -> None:
    """Of other ranks and scalings; fan_in_fan_out is GPT-2's, layers given all tokens in one dimension OPT's."""
    base = random_base(config)
    models = [make_adapter(base, tmp_path / str(n), seed=n, **form) for n, form in enumerate(FORMS)]
    wanted = [logits(model) for model in (base, *models)]
    stack = StackedAdapters(base)
    for number in range(len(FORMS)):
        stack.load(str(number), tmp_path / str(number))
    slots = [stack.acquire(name) for name in (None, "0", "1", "2")]
    for keep in (False, True):
        stack.select(slots, keep=keep)
        found = logits(base)
        for row in range(4):
            torch.testing.assert_close(found[row], wanted[row][row], atol=1e-4, rtol=1e-4)
    for slot, one in zip(slots, wanted, strict=True):
        stack.select([slot])
        torch.testing.assert_close(logits(base), one, atol=1e-4, rtol=1e-4)
    assert min(float((one - wanted[0]).abs().max()) for one in wanted[1:]) > 0.1
    stack.close()
    assert torch.equal(logits(base), wanted[0])


def test_adapters_on_embedding_and_head_are_added_as_peft_does(base: Any, tmp_path: Path) -> None:
    model = make_adapter(base, tmp_path / "a", r=3, target_modules=["embed_tokens", "lm_head", "v_proj"])
    stack = StackedAdapters(base)
    stack.load("a", tmp_path / "a")
    wanted = logits(model)
    plain = logits(base)
    stack.select([stack.acquire("a"), 0, 0, stack.acquire("a")], keep=True)
    found = logits(base)
    torch.testing.assert_close(found[[0, 3]], wanted[[0, 3]], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[1], plain[1]) or torch.allclose(found[1], plain[1], atol=1e-5)


def test_the_bases_own_embedding_may_lie_beside_the_adapter_and_another_may_not(base: Any, tmp_path: Path) -> None:
    model = make_adapter(base, tmp_path / "a", r=3, target_modules=["embed_tokens", "v_proj"])
    with quiet():
        model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    (key,) = (name for name in weights if "base_layer" in name)
    stack = StackedAdapters(base)
    stack.load("a", tmp_path / "a")
    stack.select([stack.acquire("a")])
    torch.testing.assert_close(logits(base), logits(model), atol=1e-4, rtol=1e-4)
    weights[key][5, 5] += 1
    save_file(weights, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"own weights of model\.embed_tokens"):
        stack.load("b", tmp_path / "a")


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_casts_are_those_of_peft(kind: str, base: Any, tmp_path: Path) -> None:
    """One adapter for all rows, for which not a bit may differ."""
    if kind == "nf4":  # bitsandbytes wants layers of whole blocks
        base = random_base(
            LlamaConfig(**{**LLAMA.to_dict(), "hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
        )
    base.save_pretrained(tmp_path / "base")
    settings: dict[str, Any] = {"dtype": torch.bfloat16}
    if kind == "nf4":
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        settings = {"dtype": torch.float32, "quantization_config": quantisation}

    def load() -> Any:
        with quiet():
            return type(base).from_pretrained(tmp_path / "base", **settings)

    make_adapter(base, tmp_path / "a", r=8, lora_alpha=8)
    loaded = load()
    stack = StackedAdapters(loaded)
    stack.load("a", tmp_path / "a")
    stack.select([stack.acquire("a")])
    # PEFT on a base of its own: on some processors bitsandbytes lays weights out anew at the first forward.
    assert torch.equal(logits(loaded), logits(PeftModel.from_pretrained(load(), tmp_path / "a").eval()))


def test_nothing_remains_in_a_slot_that_is_used_again(base: Any, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "wide", r=16, lora_alpha=64)
    narrow = make_adapter(base, tmp_path / "narrow", r=2, target_modules=["q_proj"])
    wanted = logits(narrow)
    stack = StackedAdapters(base, max_adapters=1)
    stack.load("wide", tmp_path / "wide")
    first = stack.acquire("wide")
    stack.select([0, first, 0, first], keep=True)
    logits(base)
    stack.release(first)
    stack.remove("wide")
    stack.load("narrow", tmp_path / "narrow")
    second = stack.acquire("narrow")
    assert second == first
    for slots in ([second], [0, second, second, second]):
        stack.select(slots, keep=len(slots) > 1)
        torch.testing.assert_close(logits(base)[1:], wanted[1:], atol=1e-4, rtol=1e-4)


def test_kept_rows_follow_what_is_selected(base: Any, tmp_path: Path) -> None:
    """Rows that go and come back, batches that grow and shrink, single adapters in between."""
    for number in range(3):
        make_adapter(base, tmp_path / str(number), seed=number, r=4 + 8 * number)
    stack = StackedAdapters(copy.deepcopy(base))
    stack.load("0", tmp_path / "0")
    stack.load("1", tmp_path / "1")
    for slots in ([1, 2, 0, 1], [2, 1], [1, 1], [1, 2, 2, 1], [2, 2, 2, 2], [0, 1, 2, 0], [3, 1, 3, 2]):
        if 3 in slots:
            stack.load("2", tmp_path / "2")  # wider: everything that was copied is so no longer
        with torch.no_grad():
            ids = IDS[: len(slots)]
            stack.select(slots, keep=True)
            kept = stack.model(input_ids=ids).logits
            stack.select(slots)
            torch.testing.assert_close(kept, stack.model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_a_selection_that_finds_no_memory_is_made_whole_the_next_time(base: Any, tmp_path: Path) -> None:
    stack = StackedAdapters(base)
    for number in range(2):
        make_adapter(base, tmp_path / str(number), seed=number, r=4)
        stack.load(str(number), tmp_path / str(number))
    wanted = {}
    for slots in ((1, 2), (2, 1, 2)):
        stack.select(slots)
        with torch.no_grad():
            wanted[slots] = base(input_ids=IDS[: len(slots)]).logits
    stack.select((1, 2), keep=True)
    with pytest.raises(torch.OutOfMemoryError), out_of_memory(torch.Tensor, "new_zeros", at=5):
        stack.select((2, 1, 2), keep=True)  # more rows: room for their copies is made anew, layer by layer
    for slots in ((2, 1, 2), (1, 2), (2, 1, 2)):
        stack.select(slots, keep=True)
        with torch.no_grad():
            found = base(input_ids=IDS[: len(slots)]).logits
        torch.testing.assert_close(found, wanted[slots], atol=1e-5, rtol=1e-5)


def test_a_wider_adapter_that_finds_no_memory_leaves_the_others_as_they_are(base: Any, tmp_path: Path) -> None:
    stack = StackedAdapters(base)
    models = [make_adapter(base, tmp_path / str(n), seed=n, r=r) for n, r in enumerate((4, 20))]
    stack.load("0", tmp_path / "0")
    wanted = [logits(model) for model in models]
    for at in (2, 5, 6):  # after A of a layer was widened, and before B was
        with pytest.raises(torch.OutOfMemoryError), out_of_memory(torch, "cat", at=at):
            stack.load("1", tmp_path / "1")
        assert stack.names == ("0",)
        stack.select([1])
        torch.testing.assert_close(logits(base), wanted[0], atol=1e-4, rtol=1e-4)
    stack.load("1", tmp_path / "1")
    for keep in (False, True):
        stack.select([1, 2, 2, 1], keep=keep)
        found = logits(base)
        for row, one in enumerate((0, 1, 1, 0)):
            torch.testing.assert_close(found[row], wanted[one][row], atol=1e-4, rtol=1e-4)


def test_an_adapter_in_use_stays_until_its_last_row_ends(base: Any, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "a")
    stack = StackedAdapters(base, max_adapters=1)
    stack.load("a", tmp_path / "a")
    with pytest.raises(ModelError, match="'a', loaded already"):
        stack.load("a", tmp_path / "a")
    slot = stack.acquire("a")
    stack.remove("a")
    assert stack.names == ()
    with pytest.raises(ModelError, match="none loaded"):
        stack.acquire("a")
    with pytest.raises(BusyError, match="one of 1 slots free"):
        stack.load("b", tmp_path / "a")
    stack.release(slot)
    stack.load("b", tmp_path / "a")
    assert stack.names == ("b",)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "changes the base's own weights"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"some_new_method": {"k": 1}}, "some_new_method"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    change: dict[str, Any], named: str, base: Any, tmp_path: Path
) -> None:
    make_adapter(base, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    stack = StackedAdapters(base, max_adapters=1)
    with pytest.raises(ModelError, match=named) as caught:
        stack.load("a", tmp_path / "a")
    assert "merge" in caught.value.fix
    assert stack.names == ()


def test_weights_that_do_not_fit_are_refused_and_take_no_slot(base: Any, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "a", r=40)
    stack = StackedAdapters(base, max_adapters=1, max_rank=32)
    with pytest.raises(ModelError, match="a rank of at most 32"):
        stack.load("a", tmp_path / "a")
    make_adapter(
        random_base(LlamaConfig(**{**LLAMA.to_dict(), "hidden_size": 64, "head_dim": 16})), tmp_path / "b", r=4
    )
    with pytest.raises(Faults, match="32 to 32 features"):
        stack.load("b", tmp_path / "b")
    make_adapter(random_base(GPT2), tmp_path / "c", r=4)
    with pytest.raises(Faults, match="no module of that name"):
        stack.load("c", tmp_path / "c")
    make_adapter(base, tmp_path / "d", r=4)
    weights = load_file(tmp_path / "d" / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, tmp_path / "d" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="finite"):
        stack.load("d", tmp_path / "d")
    make_adapter(base, tmp_path / "e", r=4)
    stack.load("e", tmp_path / "e")
