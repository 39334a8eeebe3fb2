"""PEFT adapters: their configuration, and what they would match in a base."""

from __future__ import annotations

import re
from collections.abc import Sequence

from peft import LoraConfig, TaskType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ift_peft.errors import ModelError
from ift_peft.sections import Adapter, Head


def lora_config(
    adapter: Adapter,
    model: PreTrainedModel,
    *,
    base_name: str,
    revision: str | None,
    head: Head = "causal-lm",
    made: Sequence[str] = (),
) -> LoraConfig:
    """PEFT's configuration of the recipe's section `adapter` for `model` (LoRA, arXiv:2106.09685).

    Modules whose weights were `made` new are trained whole and saved with the adapter; PEFT itself does so with what
    is called as classifiers' heads are.
    """
    modules = adapter.target_modules
    if adapter.embeddings:
        names = [*matched_modules(model, modules), embedding_name(model)]
        modules = tuple(sorted(names if adapter.target_modules != "all-linear" else {_ending(name) for name in names}))
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        bias=adapter.bias,
        use_rslora=adapter.use_rslora,
        task_type=TaskType.CAUSAL_LM if head == "causal-lm" else TaskType.SEQ_CLS,
        modules_to_save=[name for name in made if name.partition(".")[0] not in SEQ_CLS_HEAD_NAMES] or None,
        base_model_name_or_path=base_name,
        revision=revision,
    )


def matched_modules(model: PreTrainedModel, target_modules: str | tuple[str, ...]) -> list[str]:
    """Names of the linear modules that `target_modules` selects, by PEFT's rules.

    Raises `ModelError` where a listed name, or the pattern, selects none, or where it selects the language-model head.
    """
    head_name = _head_name(model)
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not (head_name and f"{name}.".startswith(f"{head_name}."))
    ]
    endings = sorted({_ending(name) for name in linears})
    hint = f"use all-linear, or a list of names out of {', '.join(endings)}"
    if target_modules == "all-linear":
        return linears
    if isinstance(target_modules, str):
        matched = _matched_by_pattern(model, target_modules, linears, hint)
        missing = [] if matched else [target_modules]
    else:
        matched = [name for name in linears if any(_ends_with(name, ending) for ending in target_modules)]
        wanted = [ending for ending in target_modules if not (head_name and _ends_with(head_name, ending))]
        missing = [ending for ending in wanted if not any(_ends_with(name, ending) for name in linears)]
        if len(wanted) < len(target_modules):
            raise ModelError(
                expected="target_modules without the head",
                found=f"{head_name!r} among them, which no adapter goes on",
                fix=f"remove it; {hint}",
            )
    if missing or not matched:
        raise ModelError(
            expected="adapter.target_modules to match modules of the base",
            found=f"no linear module for {', '.join(map(repr, missing)) or 'an empty list'}",
            fix=hint,
        )
    return matched


def _matched_by_pattern(model: PreTrainedModel, pattern: str, linears: list[str], hint: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ModelError(
            expected="adapter.target_modules to be all-linear, a list, or a regular expression",
            found=f"{pattern!r} ({error})",
            fix=hint,
        ) from None
    selected = [name for name, _ in model.named_modules() if name and compiled.fullmatch(name)]
    wrong = [name for name in selected if name not in linears]
    if wrong:
        raise ModelError(
            expected="a pattern that matches linear modules only, without the language-model head",
            found=f"{wrong[0]!r} among its matches",
            fix="end it in the module's own name, e.g. .*self_attn[.]q_proj",
        )
    return selected


def embedding_name(model: PreTrainedModel) -> str:
    """The name of the module that turns token ids into vectors."""
    embedding = model.get_input_embeddings()
    name: str = next(name for name, module in model.named_modules() if module is embedding)
    return name


def _head_name(model: PreTrainedModel) -> str | None:
    """The language-model head, or the classifier's by the names that PEFT knows them by."""
    head = model.get_output_embeddings()
    if head is not None:
        found: str = next(name for name, module in model.named_modules() if module is head)
        return found
    return next((name for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)), None)


def _ending(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
