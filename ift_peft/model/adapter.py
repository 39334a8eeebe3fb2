"""PEFT adapters: their configuration, and what they would match in a base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, TaskType, VeraConfig
from peft.utils.constants import SEQ_CLS_HEAD_NAMES, TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ift_peft.errors import IftPeftError, ModelError, raise_all
from ift_peft.sections import Adapter, Head, Quantization


def peft_config(
    adapter: Adapter,
    model: PreTrainedModel,
    *,
    base_name: str,
    revision: str | None,
    head: Head = "causal-lm",
    made: Sequence[str] = (),
) -> PeftConfig:
    """PEFT's configuration of the recipe's section `adapter` for `model`.

    LoRA arXiv:2106.09685, rsLoRA 2312.03732, DoRA 2402.09353, PiSSA 2404.02948, OLoRA 2406.01775, LoftQ 2310.08659,
    EVA 2410.07170, VeRA 2310.11454, (IA)3 2205.05638, AdaLoRA 2303.10512. How pissa, olora, loftq and eva begin is not
    PEFT's configuration but `initialise`'s: the first two are LoRA of twice the rank from the start. Modules whose
    weights were `made` new are trained whole and saved with the adapter; PEFT itself does so with what is called as
    classifiers' heads are.
    """
    made = [name for name in made if name.partition(".")[0] not in SEQ_CLS_HEAD_NAMES]
    common = {
        "task_type": TaskType.CAUSAL_LM if head == "causal-lm" else TaskType.SEQ_CLS,
        "modules_to_save": list(dict.fromkeys((*made, *adapter.modules_to_save))) or None,
        "base_model_name_or_path": base_name,
        "revision": revision,
        "target_modules": _targets(adapter, model),
    }
    if adapter.method == "ia3":
        return IA3Config(feedforward_modules=_feedforward(adapter, model), **common)
    if adapter.method == "vera":
        return VeraConfig(r=adapter.r, vera_dropout=adapter.lora_dropout, **common)
    if adapter.method == "adalora":
        return AdaLoraConfig(
            target_r=adapter.r,
            init_r=adapter.starting_rank,
            lora_alpha=adapter.lora_alpha,
            lora_dropout=adapter.lora_dropout,
            tinit=adapter.tinit,
            tfinal=adapter.tfinal,
            total_step=adapter.tinit + adapter.tfinal + 1,  # the trainer counts its steps later
            orth_reg_weight=adapter.orth_reg_weight,
            **common,
        )
    rslora = adapter.use_rslora or adapter.method == "rslora"
    times = 2 if adapter.subtracts_its_start else 1
    same_scale = times**0.5 if rslora else times
    return LoraConfig(
        r=times * adapter.r,
        lora_alpha=same_scale * adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        bias=adapter.bias,
        use_rslora=rslora,
        use_dora=adapter.method == "dora",
        rank_pattern={key: times * rank for key, rank in adapter.rank_pattern.items()},
        alpha_pattern={key: same_scale * alpha for key, alpha in adapter.alpha_pattern.items()},
        **common,
    )


def _targets(adapter: Adapter, model: PreTrainedModel) -> str | list[str]:
    modules = adapter.target_modules
    if adapter.embeddings:
        names = [*matched_modules(model, modules), embedding_name(model)]
        modules = tuple(sorted(names if adapter.target_modules != "all-linear" else {_ending(name) for name in names}))
    return modules if isinstance(modules, str) else list(modules)


def _feedforward(adapter: Adapter, model: PreTrainedModel) -> str | list[str]:
    """A pattern of the modules whose input (IA)3 scales, as PEFT has them for the architecture unless they are given.

    Raises `ModelError` for an architecture that PEFT has none for, and for given ones that are no targets.
    """
    given = adapter.feedforward_modules
    names = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model.config.model_type)
    if given is None and names is None:
        raise ModelError(
            expected="adapter.feedforward_modules, as PEFT has none for this architecture",
            found=f"model_type {model.config.model_type!r}",
            fix="name the last linear module of each feed-forward block, or [] to scale outputs only",
        )
    matched = matched_modules(model, adapter.target_modules)
    chosen = tuple(names or ()) if given is None else given
    missing = [ending for ending in chosen if not any(_ends_with(name, ending) for name in matched)]
    if given is not None and missing:
        raise ModelError(
            expected="adapter.feedforward_modules out of the targets",
            found=f"no target for {', '.join(map(repr, missing))}",
            fix=f"choose out of {', '.join(sorted({_ending(name) for name in matched}))}",
        )
    return f"(.*[.])?({'|'.join(map(re.escape, chosen))})" if chosen else []


def check_adapter(adapter: Adapter, model: PreTrainedModel, *, quantization: Quantization = "none") -> None:
    """Whether all that `adapter` names is in `model`, which may be without weights.

    Raises `ModelError`, or `Faults` holding one for each name, pattern or rank that does not fit.
    """
    matched = matched_modules(model, adapter.target_modules)
    if adapter.method == "ia3":
        _feedforward(adapter, model)
    faults: list[IftPeftError] = []
    for setting in ("rank_pattern", "alpha_pattern"):
        keys: dict[str, float] = getattr(adapter, setting)
        unused = set(keys) - {get_pattern_key(keys, name) for name in matched}
        faults += [
            ModelError(
                expected=f"adapter.{setting} to name targets",
                found=f"{key!r}, which matches none, or none that an entry before it does not",
                fix=f"use endings of {matched[0]!r} and its like, or regular expressions",
            )
            for key in sorted(unused)
        ]
    faults += _rank_faults(adapter, model, matched)
    laid_over = [*matched, embedding_name(model)] if adapter.embeddings else matched
    for ending in adapter.modules_to_save:
        faults += _whole_faults(ending, model, laid_over, quantization)
    raise_all(faults)


def _rank_faults(adapter: Adapter, model: PreTrainedModel, matched: Sequence[str]) -> list[IftPeftError]:
    """Ranks that a decomposition cannot have: a matrix has no more directions than rows or columns."""
    if adapter.method not in ("pissa", "olora", "loftq", "eva"):
        return []
    faults: list[IftPeftError] = []
    for name in matched:
        inputs, outputs = features(model.get_submodule(name))
        rank = adapter.rank_pattern.get(get_pattern_key(adapter.rank_pattern, name), adapter.r)
        most = inputs if adapter.method == "eva" else min(inputs, outputs)
        asked = round(rank * adapter.eva_rho) if adapter.method == "eva" else rank
        if asked > most:
            found = ModelError(
                expected=f"a rank of at most {most} for {name} with {adapter.method}",
                found=str(asked) + (f", {rank} times eva_rho" if adapter.method == "eva" else ""),
                fix="lower adapter.r, or give it a rank of its own in adapter.rank_pattern",
            )
            faults.append(found)
    return faults[:3]


def _whole_faults(
    ending: str, model: PreTrainedModel, matched: Sequence[str], quantization: Quantization
) -> Iterator[IftPeftError]:
    """What keeps the modules of an ending from being trained whole."""
    names = [name for name, _ in model.named_modules() if name and name.endswith(ending)]  # as PEFT looks for them
    head = _head_name(model)
    packed = [name for name in names if quantization != "none" and name != head and _is_linear(model, name)]
    adapted = [name for name in names if any(f"{one}.".startswith(f"{name}.") for one in matched)]
    for wrong, found, fix in (
        (not names, "no module of that ending", f"name one as {head or matched[0]!r}"),
        (bool(packed), f"{packed[:1]}, quantised to {quantization}", "set base.quantization=none, or adapt it instead"),
        (bool(adapted), f"{adapted[:1]}, which the adapter is laid over", "take it out of adapter.target_modules"),
    ):
        if wrong:
            yield ModelError(
                expected=f"adapter.modules_to_save {ending!r} to be trained whole", found=str(found), fix=fix
            )


def _is_linear(model: PreTrainedModel, name: str) -> bool:
    return any(isinstance(module, nn.Linear | Conv1D) for module in model.get_submodule(name).modules())


def features(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear module."""
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
    else:
        outputs, inputs = module.weight.shape
    return int(inputs), int(outputs)


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
