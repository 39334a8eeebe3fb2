from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from ift_peft.errors import ModelError
from ift_peft.model.adapter import matched_modules
from ift_peft.model.base import choose_device, load_base
from ift_peft.model.configuration import skeleton
from ift_peft.model.tokenizer import locate_base

TOKENS = torch.arange(40).view(2, 20) + 5


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_weights_dequantised_once_give_the_numbers_of_bitsandbytes(kind: str, double: bool) -> None:
    location = locate_base("tiny")
    ours = load_base(location, quantization=kind, double_quantization=double, device="cpu")  # type: ignore[arg-type]
    stock = AutoModelForCausalLM.from_pretrained(
        location.folder,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    ).train()  # in evaluation mode bitsandbytes repacks for bfloat16 kernels on some processors; tiny has no dropout
    assert torch.equal(logits(ours.model), logits(stock))
    assert not torch.equal(logits(ours.model), logits(load_base(location, device="cpu").model))
    assert "dequantised once" in ours.notes[0]


def test_int8_is_close_to_the_base_and_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    location = locate_base("tiny")
    with caplog.at_level(logging.WARNING):
        quantised = logits(load_base(location, quantization="int8", device="cpu").model)
    plain = logits(load_base(location, device="cpu").model)
    assert not caplog.records
    assert not torch.equal(quantised, plain)
    assert (quantised - plain).abs().mean() < 0.1 * plain.std()


def test_a_base_without_safetensors_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    config.save_pretrained(tmp_path)
    torch.save(LlamaForCausalLM(config).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled ones \(pytorch_model\.bin\)"):
        locate_base(str(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no weights"):
        locate_base(str(tmp_path))


def test_an_unknown_base_is_refused_offline() -> None:
    with pytest.raises(ModelError, match="'someone/some-model'"):
        locate_base("someone/some-model")


def test_a_fingerprint_changes_with_one_weight(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    before = locate_base(str(tmp_path)).fingerprint()
    assert locate_base(str(tmp_path)).fingerprint() == before
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    model.save_pretrained(tmp_path)
    assert locate_base(str(tmp_path)).fingerprint() != before


def test_public_names_hold_no_path(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "my-base")
    assert locate_base(str(tmp_path / "my-base")).public_name == "my-base"
    assert locate_base("tiny").public_name == "tiny"


def test_target_modules_select_by_pefts_rules() -> None:
    bare = skeleton(locate_base("tiny"))
    layers = bare.config.num_hidden_layers
    assert len(matched_modules(bare, "all-linear")) == 7 * layers
    assert len(matched_modules(bare, ("q_proj", "v_proj"))) == 2 * layers
    assert matched_modules(bare, r".*layers\.0\..*_proj") == [
        m for m in matched_modules(bare, "all-linear") if ".0." in m
    ]
    with pytest.raises(ModelError, match=r"'qproj'[\s\S]*q_proj"):
        matched_modules(bare, ("qproj", "v_proj"))
    for wrong, message in (
        ("q_proj.*", "no linear module"),
        ("*_proj", "a regular expression"),
        (".*attn.*", "linear modules only"),
        (".*(q_proj|lm_head)", "lm_head"),
        ((), "an empty list"),
    ):
        with pytest.raises(ModelError, match=message):
            matched_modules(bare, wrong)
    with pytest.raises(ModelError, match="lm_head"):
        matched_modules(bare, ("q_proj", "lm_head"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_is_not_silently_replaced() -> None:
    with pytest.raises(ModelError, match="a CUDA device"):
        choose_device("cuda")
