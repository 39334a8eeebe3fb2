"""What the method of an adapter needs beside PEFT's configuration: how it begins, learns, goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_optimizer import is_optimizer_factory

from ift_peft.data.render import Rendered
from ift_peft.errors import DataError, RecipeError
from ift_peft.infer.batches import pad
from ift_peft.infer.load import class_head
from ift_peft.model.adapter import peft_config
from ift_peft.model.base import LoadedBase, load_section
from ift_peft.model.initialise import (
    begin_with_activations,
    begin_with_base,
    begin_with_residual,
    freeze_second_half,
    in_float32,
    whole_in_float32,
)
from ift_peft.recipe import Recipe
from ift_peft.train.allocation import RankAllocation
from ift_peft.train.prepare import Prepared

_EVA_ROWS = 16  # of a batch in which directions are looked for; more where these have too few tokens


def adapter_config(recipe: Recipe, prepared: Prepared, base: LoadedBase, *, begun: Path | None) -> PeftConfig:
    """PEFT's configuration of a new adapter; where eva's goes on from the one in `begun`, with the ranks found then."""
    if begun is not None and recipe.adapter.method == "eva":
        config = PeftConfig.from_pretrained(str(begun))
        config.inference_mode = False
        return config
    return peft_config(
        recipe.adapter,
        base.model,
        base_name=str(prepared.location.folder),
        revision=prepared.location.revision,
        head=recipe.base.head,
        made=base.made,
    )


def begin(model: Any, recipe: Recipe, prepared: Prepared, *, begun: bool) -> int:
    """Give a new adapter the weights that its method begins with, unless `begun`, when others are loaded over them.

    Returns how many of its weights are frozen, though PEFT counts them as trained.
    """
    adapter = recipe.adapter
    in_float32(model)
    whole_in_float32(model)
    if adapter.subtracts_its_start and not begun:
        begin_with_base(model, adapter)
    if adapter.method == "loftq" and not begun:
        begin_with_residual(model, _unquantised(recipe, prepared))
    if adapter.method == "eva" and not begun:
        device = next(model.parameters()).device
        begin_with_activations(model, adapter, EvaBatches(prepared, recipe, device), head=recipe.base.head)
        in_float32(model)  # modules whose rank changed have new weights
    return freeze_second_half(model) if adapter.subtracts_its_start else 0


def _unquantised(recipe: Recipe, prepared: Prepared) -> Any:
    section = recipe.base.model_copy(update={"device": "cpu"})
    head = class_head(recipe, prepared.tokenizer)
    return load_section(prepared.location, section, quantization="none", compute_dtype="float32", head=head).model


@dataclass
class EvaBatches:
    """Training rows in batches, drawn with the recipe's seed, each of more tokens than directions are looked for.

    Raises `DataError` where the rows do not make one.
    """

    prepared: Prepared
    recipe: Recipe
    device: torch.device

    def __post_init__(self) -> None:
        adapter = self.recipe.adapter
        most = max((adapter.r, *adapter.rank_pattern.values()))
        tokens = 2 * round(most * adapter.eva_rho)
        generator = torch.Generator().manual_seed(self.recipe.seed)
        self.batches: list[list[int]] = []
        rows: list[int] = []
        for row in torch.randperm(len(self.prepared.lengths), generator=generator).tolist():
            rows.append(row)
            if len(rows) >= _EVA_ROWS and sum(int(self.prepared.lengths[one]) for one in rows) >= tokens:
                self.batches.append(rows)
                rows = []
        if not self.batches and sum(int(self.prepared.lengths[one]) for one in rows) >= tokens:
            self.batches = [rows]
        if not self.batches:
            raise DataError(
                expected=f"training rows of {tokens} tokens or more, to find the directions in that eva begins with",
                found=f"{len(rows)} rows with fewer",
                fix="lower adapter.r, or set adapter.method=lora",
            )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in self.batches:
            columns = [self.prepared.train.dataset[row] for row in rows]
            rendered = [Rendered(one["input_ids"], one["labels"]) for one in columns]
            batch = pad(rendered, int(self.prepared.tokenizer.pad_token_id))
            yield {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}


def loraplus_optimizer(
    model: Any, training: TrainingArguments, kind: Any, arguments: dict[str, Any], *, ratio: float
) -> Any:
    """An optimizer by which B learns `ratio` times as fast as A (LoRA+, Hayou et al. 2024, arXiv:2402.12354).

    `kind` and `arguments` are those that transformers has for `training`. An adapted embedding learns at the rate of A:
    PEFT's default for it, 1e-6, would hold it still. Raises `RecipeError` for an optimizer without groups of weights.
    """
    if is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & set(arguments):
        raise RecipeError(
            expected="adapter.loraplus_lr_ratio with an optimizer that takes groups of weights",
            found=f"training.optim={training.optim}",
            fix="remove training.optim, or adapter.loraplus_lr_ratio",
        )
    return create_loraplus_optimizer(
        model,
        kind,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=training.weight_decay,
        loraplus_lr_embedding=arguments["lr"],
        **arguments,
    )


def allocation_of(model: Any, recipe: Recipe) -> RankAllocation | None:
    """What takes ranks away in training, with adalora."""
    return RankAllocation(model) if recipe.adapter.method == "adalora" else None
