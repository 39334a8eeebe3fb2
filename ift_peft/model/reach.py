"""What an adapter reaches in a base, by PEFT's own account: linear modules, and experts that are stacks of weights."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from ift_peft.errors import ModelError, first_line
from ift_peft.model.adapter import matched_modules, peft_config
from ift_peft.model.quiet import quiet
from ift_peft.sections import Adapter, Head

_DECOMPOSES = ("pissa", "olora", "loftq", "eva")  # begun as directions of each linear module's weight or inputs


def reach(bare: PreTrainedModel, adapter: Adapter, *, head: Head = "causal-lm") -> list[str]:
    """Notes on what `adapter` changes besides linear modules, and on what it leaves out; `bare` is used up by it.

    transformers runs the experts of a mixture as parameters of three dimensions. Of families that once had linear ones
    PEFT adapts them, and their routers, as `target_parameters`; of others it does not. `bare` is on the meta device.
    Raises `ModelError` for settings that PEFT does not take for this base.
    """
    wanted = set(matched_modules(bare, adapter.target_modules))
    stacks = expert_stacks(bare)
    try:
        with quiet(), torch.device("meta"):
            config = peft_config(adapter, bare, base_name=bare.name_or_path, revision=None, head=head)
            tuner = get_peft_model(bare, config, low_cpu_mem_usage=True).base_model
    except ValueError as error:
        raise ModelError(
            expected=f"settings of the section adapter that PEFT takes for {type(bare).__name__}",
            found=first_line(error) + (" (ParamWrapper: experts and routers)" if stacks else ""),
            fix="change the setting named there, or list target_modules without the experts'",
        ) from error
    reached = set(tuner.targeted_parameter_names)
    if reached and adapter.method in _DECOMPOSES:
        raise ModelError(
            expected=f"linear modules only for {adapter.method}, which begins as directions of each",
            found=f"experts and routers among the targets, which are parameters: {_patterns(reached)}",
            fix="list target_modules without the experts and their routers, or set adapter.method=lora",
        )
    notes = []
    if reached:
        notes.append(f"adapted as parameters, being no linear modules: {_patterns(reached)}")
    if stacks - reached:
        notes.append(f"not adapted, as PEFT reaches linear modules only: {_patterns(stacks - reached)}")
    left = wanted - set(tuner.targeted_module_names)
    if left:
        notes.append(f"not adapted, as PEFT takes their names for those of experts: {_patterns(left)}")
    return notes


def expert_stacks(model: PreTrainedModel) -> set[str]:
    """Names of the parameters that hold a weight matrix for each expert, of shape (experts, …, …)."""
    return {name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "expert" in name}


def _patterns(names: Iterable[str]) -> str:
    """Names with `*` for the number of the layer, each once."""
    return ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names}))
