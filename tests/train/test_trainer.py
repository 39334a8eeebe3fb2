"""Our trainer against TRL's own: equal settings, equal loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from ift_peft.data.fit import fit_rows
from ift_peft.data.render import Rendered, Renderer
from ift_peft.data.rows import read_rows
from ift_peft.data.store import to_dataset
from ift_peft.errors import RecipeError
from ift_peft.model.tokenizer import TINY
from ift_peft.recipe import load_recipe
from ift_peft.train.arguments import choose_max_length, sft_config
from ift_peft.train.trainer import SupervisedTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def rendered() -> list[Rendered]:
    rows, _ = read_rows(load_recipe("sentiment", ["data.max_train_rows=48"]).data)
    return fit_rows(rows, Renderer(AutoTokenizer.from_pretrained(TINY)), max_length=128, overlong="truncate").rendered


def curve(
    trainer_class: type[SFTTrainer], rows: Dataset, folder: Path, **settings: Any
) -> tuple[list[float], torch.Tensor]:
    settings = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "activation_checkpointing": False,
        **settings,
    }
    config = SFTConfig(
        output_dir=str(folder),
        report_to="none",
        max_steps=6,
        logging_steps=1,
        optim="sgd",  # Adam divides by gradients near zero, which makes rounding visible
        learning_rate=0.1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        max_length=None,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **settings,
    )
    set_seed(0)
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32),
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(TINY),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], weights


@pytest.mark.slow
def test_the_loss_curve_and_the_weights_are_those_of_sft_trainer(rendered: list[Rendered], tmp_path: Path) -> None:
    rows = to_dataset(rendered)
    ours, our_weights = curve(SupervisedTrainer, rows, tmp_path)
    theirs, their_weights = curve(SFTTrainer, rows, tmp_path)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert torch.allclose(our_weights, their_weights, atol=1e-5)
    assert ours[-1] < ours[0]


@pytest.mark.slow
def test_accumulation_and_checkpointing_change_speed_and_not_the_curve(
    rendered: list[Rendered], tmp_path: Path
) -> None:
    rows = to_dataset(rendered)
    plain, _ = curve(SupervisedTrainer, rows, tmp_path)
    accumulated, _ = curve(
        SupervisedTrainer, rows, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert accumulated == pytest.approx(plain, rel=1e-4)
    checkpointed, _ = curve(SupervisedTrainer, rows, tmp_path, activation_checkpointing=True)
    assert checkpointed == pytest.approx(plain, rel=1e-5)


def test_our_defaults_suit_the_device_and_the_recipe_overrides_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {"output_dir": tmp_path, "device": torch.device("cpu"), "compute_dtype": torch.float32}
    config = sft_config({}, max_length=64, **options)
    assert (config.bf16, config.activation_checkpointing, config.logging_nan_inf_filter) == (False, False, False)
    assert config.train_sampling_strategy == "group_by_length"
    config = sft_config({"gradient_checkpointing": True, "save_strategy": "no"}, max_length=64, **options)
    assert config.activation_checkpointing
    assert config.save_strategy == "no"
    with pytest.raises(RecipeError, match="batch_rebalance"):
        sft_config({"train_sampling_strategy": "batch_rebalance"}, max_length=64, **options)
    with pytest.raises(RecipeError, match="sometimes"):
        sft_config({"save_strategy": "sometimes"}, max_length=64, **options)


def test_max_length_is_bounded_by_the_positions_of_the_base() -> None:
    recipe = load_recipe("sentiment")
    unset = recipe.model_copy(update={"training": {}})

    def chosen(wanted: int | None, positions: int | None) -> int | None:
        return choose_max_length(recipe.model_copy(update={"training": {"max_length": wanted}}), positions)

    assert choose_max_length(unset, 512) == 512
    assert choose_max_length(unset, None) == 1024
    assert chosen(300, 512) == 300
    assert chosen(None, None) is None
    for wanted in (513, None):
        with pytest.raises(RecipeError, match=r"training\.max_length=512"):
            chosen(wanted, 512)
    generating = load_recipe("qa", ["evaluation.max_new_tokens=100"]).model_copy(update={"training": {}})
    assert choose_max_length(generating, 512) == 412
