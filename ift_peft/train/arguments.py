"""The recipe's section `training` as TRL's `SFTConfig`, with what we decide ourselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
from trl import SFTConfig

from ift_peft.errors import RecipeError, first_line
from ift_peft.recipe import Recipe
from ift_peft.selection import Validation
from ift_peft.train.batching import Strategy
from ift_peft.training_fields import training_fields

DEFAULT_MAX_LENGTH = 1024
# transformers renamed it and warns of the old name, which TRL still documents; a recipe may use either.
CHECKPOINTING_NAMES = ("activation_checkpointing", "gradient_checkpointing")
CHECKPOINTING = next(name for name in CHECKPOINTING_NAMES if name in training_fields())


def choose_max_length(recipe: Recipe, max_positions: int | None) -> int | None:
    """`training.max_length`, by default 1,024 or what the base can take, whichever is less.

    Where answers are generated in measuring, the default leaves room for them.

    Raises `RecipeError` for more than the base's position embeddings.
    """
    training, limit = recipe.training, max_positions
    if "max_length" not in training:
        generated = recipe.evaluation.metrics or any(source.metrics for source in recipe.data.sources)
        reserved = recipe.evaluation.max_new_tokens if generated else 0
        return min(DEFAULT_MAX_LENGTH, max(limit - reserved, 1) if limit else DEFAULT_MAX_LENGTH)
    wanted = training["max_length"]
    if limit is not None and (wanted is None or wanted > limit):
        raise RecipeError(
            expected=f"training.max_length of at most {limit}, the positions of the base",
            found=repr(wanted),
            fix=f"set training.max_length={limit}",
        )
    return None if wanted is None else int(wanted)


def checkpoints_kept(validation: bool) -> int:
    """`training.save_total_limit` where a recipe has none: the newest, one to fall back on, and the best."""
    return 3 if validation else 2


def validation_arguments(section: Validation | None, *, labels: bool) -> dict[str, Any] | None:
    """The recipe's section `validation` as fields of `SFTConfig`: a checkpoint at each measurement, the best one used.

    Of the checkpoints, the best and the newest stay.
    """
    if section is None:
        return None
    strategy = "epoch" if section.every == "epoch" else "steps"
    metric = section.chosen_metric(labels=labels)
    found = {
        "eval_strategy": strategy,
        "save_strategy": strategy,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": metric != "loss",
        "restore_callback_states_from_checkpoint": True,
    }
    return found if section.every == "epoch" else {**found, "eval_steps": section.every, "save_steps": section.every}


def arguments_of(
    recipe: Recipe, *, output_dir: Path, device: torch.device, compute_dtype: torch.dtype, max_length: int | None
) -> SFTConfig:
    """The sections `training` and `validation` of a recipe as one `SFTConfig`. Raises `RecipeError` as `sft_config`."""
    return sft_config(
        recipe.training,
        output_dir=output_dir,
        device=device,
        compute_dtype=compute_dtype,
        max_length=max_length,
        validation=validation_arguments(recipe.validation, labels=bool(recipe.data.label_words)),
    )


def sft_config(
    training: dict[str, Any],
    *,
    output_dir: Path,
    device: torch.device,
    compute_dtype: torch.dtype,
    max_length: int | None,
    validation: dict[str, Any] | None = None,
) -> SFTConfig:
    """`training` over our defaults: on CPU, TRL's bf16 and checkpointing are off, as both only cost time there.

    `validation` is what `validation_arguments` made of that section.

    Raises `RecipeError` with what `SFTConfig` says of values that it refuses.
    """
    on_gpu = device.type == "cuda"
    strategy = training.get("train_sampling_strategy", "group_by_length")
    if strategy not in get_args(Strategy):
        raise RecipeError(
            expected=f"training.train_sampling_strategy out of {', '.join(get_args(Strategy))}",
            found=repr(strategy),
            fix="choose one of them; orders are ours, so that a resumed run takes the rows it would have taken",
        )
    arguments: dict[str, Any] = {
        "report_to": "none",
        "save_strategy": "epoch",
        "save_total_limit": checkpoints_kept(validation is not None),
        "logging_steps": 10,
        "train_sampling_strategy": "group_by_length",
        "bf16": on_gpu and compute_dtype == torch.bfloat16,
        "fp16": on_gpu and compute_dtype == torch.float16,
        "dataloader_pin_memory": on_gpu,
        **{key: value for key, value in training.items() if key != "gradient_checkpointing"},
        CHECKPOINTING: training.get(CHECKPOINTING, training.get("gradient_checkpointing", on_gpu)),
        "max_length": max_length,
        "output_dir": str(output_dir),
        "use_cpu": not on_gpu,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        **(validation or {}),
    }
    try:
        config = SFTConfig(**arguments)
        if on_gpu:
            _ = config.device  # counts the devices; one is used, as TRL refuses DataParallel
            config._n_gpu = min(1, config._n_gpu)
        return config
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(
            expected="values in training that TRL's SFTConfig accepts",
            found=first_line(error),
            fix="change the value named there",
        ) from error
