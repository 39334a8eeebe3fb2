"""AdaLoRA in training: ranks taken away where they matter least, and singular vectors kept orthogonal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ift_peft.errors import RecipeError
from ift_peft.model.initialise import NAME
from ift_peft.train.checkpoints import ALLOCATION

_MEANS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class RankAllocation(TrainerCallback):
    """Calls PEFT's `update_and_allocate` after each optimizer step (Zhang et al. 2023, arXiv:2303.10512).

    PEFT would cut the ranks that are masked at the moment out of every checkpoint, though they may come back, and warn
    where such an adapter is opened; here adapters are saved whole, with singular values of 0 where a rank was taken.
    Checkpoints hold the running means of the importances as well.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.pattern: dict[str, list[bool]] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        config = self.model.peft_config[NAME]
        if state.max_steps <= config.tinit + config.tfinal:
            raise RecipeError(
                expected="adapter.tinit and adapter.tfinal to leave steps in which ranks are reduced",
                found=f"{config.tinit} and {config.tfinal} of {state.max_steps}",
                fix="lower them, or train longer",
            )
        config.total_step = state.max_steps

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        config = self.model.peft_config[NAME]
        config.rank_pattern = self.pattern
        self.model.base_model.update_and_allocate(state.global_step + 1)  # the step that is being taken, from 1
        self.pattern, config.rank_pattern = config.rank_pattern, None

    def save(self, checkpoint: Path) -> None:
        """Write the importances into `checkpoint`."""
        allocator = self.model.base_model.rankallocator
        tensors = {f"{mean}/{name}": tensor for mean in _MEANS for name, tensor in getattr(allocator, mean).items()}
        tensors |= {f"pattern/{name}": torch.tensor(kept) for name, kept in (self.pattern or {}).items()}
        save_file(tensors, checkpoint / ALLOCATION)

    def restore(self, checkpoint: Path) -> None:
        """Go on from the importances in `checkpoint`."""
        device = next(self.model.parameters()).device
        allocator = self.model.base_model.rankallocator
        self.pattern = {}
        for key, tensor in load_file(checkpoint / ALLOCATION).items():
            kind, _, name = key.partition("/")
            if kind == "pattern":
                self.pattern[name] = tensor.tolist()
            elif kind in _MEANS:
                getattr(allocator, kind)[name] = tensor.to(device)
        self.pattern = self.pattern or None


def orthogonality(model: Any) -> Tensor:
    """AdaLoRA's penalty: the mean over A and B of the Frobenius norm of what their Gram matrices are off the identity.

    As in the forward of PEFT's `AdaLoraModel`, which adds it to a loss that is not ours.
    """
    grams = []
    for name, weight in model.named_parameters():
        if f"lora_A.{NAME}" in name:
            grams.append(weight @ weight.T)
        elif f"lora_B.{NAME}" in name:
            grams.append(weight.T @ weight)
    norms = [torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device).to(gram)) for gram in grams]
    return torch.stack(norms).mean()
