"""Loading a base model, quantised or not, on the device at hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from ift_peft.errors import ModelError, first_line
from ift_peft.model.heads import HEAD_NAMES, ClassHead, check_classes, widen_head
from ift_peft.model.quantization import dequantize_once, quantization_config
from ift_peft.model.quiet import quiet
from ift_peft.model.tokenizer import BaseLocation
from ift_peft.sections import Base, Quantization

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LoadedBase:
    """A base ready for an adapter. `notes` are the choices made for the user that the run must record.

    `made` are the modules that its weights do not have, as a new head: they are trained whole and saved with the
    adapter.
    """

    model: PreTrainedModel
    device: torch.device
    compute_dtype: torch.dtype
    quantization: Quantization
    notes: list[str] = field(default_factory=list)
    made: tuple[str, ...] = ()


def choose_device(device: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device. Raises `ModelError` where CUDA is asked for and absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError(expected="a CUDA device", found="none", fix="use base.device=auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def choose_dtype(compute_dtype: str, device: torch.device) -> torch.dtype:
    """float32 on CPU, where it is the fastest that every processor has; bfloat16 on a GPU that has it, else float16."""
    if compute_dtype != "auto":
        return DTYPES[compute_dtype]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_base(
    location: BaseLocation,
    *,
    quantization: Quantization = "none",
    double_quantization: bool = True,
    compute_dtype: str = "auto",
    device: str = "auto",
    head: ClassHead | None = None,
    packed: bool = False,
) -> LoadedBase:
    """The base in evaluation mode, as a causal language model or with a classifier's `head`.

    On CPU, nf4 and fp4 weights are dequantised once and kept, memory permitting: the numbers are those of the
    quantised base, the speed that of the plain one. Not so where they are to stay `packed`. Raises `ModelError` for
    weights that cannot be loaded.
    """
    place = choose_device(device)
    dtype = choose_dtype(compute_dtype, place)
    notes: list[str] = []
    arguments: dict[str, Any] = {"dtype": dtype}
    if quantization != "none":
        settings = quantization_config(quantization, double_quantization, dtype)
        if head is not None:
            settings.llm_int8_skip_modules = [*HEAD_NAMES]  # a head is trained whole, which packed weights cannot be
        arguments |= {"quantization_config": settings, "device_map": {"": str(place)}}
    made: tuple[str, ...] = ()
    with quiet():
        try:
            model, made = _from_weights(location, head, arguments)
        except ModelError:
            raise
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                expected=f"a base for {'generation' if head is None else 'a classifier'} in {location.folder}",
                found=first_line(error),
                fix="check that its architecture is known to the installed transformers and its weights are complete",
            ) from error
        stacks = sum(one.numel() for one in model.parameters() if one.dim() == 3 and quantization != "none")
        if stacks:
            notes.append(f"{quantization} packs linear modules; {stacks:,} weights of experts stay as they are")
        if place.type == "cpu" and quantization in ("nf4", "fp4") and not packed:
            notes.append(dequantize_once(model, dtype, quantization))
    if quantization == "none":
        model.to(place)
    model.eval()
    model.name_or_path = str(location.folder)  # PEFT looks here, not on the Hub, for the base's vocabulary size
    return LoadedBase(model, place, dtype, quantization, notes, made)


def _from_weights(
    location: BaseLocation, head: ClassHead | None, arguments: dict[str, Any]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model, and the modules of its head that the weights do not have: drawn by the head's seed, always the same.

    Raises `ModelError` where the weights lack anything else, which transformers would draw at random as well.
    """
    kind = AutoModelForCausalLM if head is None else AutoModelForSequenceClassification
    if head is not None:
        check_classes(location, head)
    with torch.random.fork_rng():
        torch.manual_seed(0 if head is None else head.seed)
        model, info = kind.from_pretrained(
            location.folder,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            **({} if head is None else head.settings()),
            **arguments,
        )
    lacking = [
        name for name in sorted(info["missing_keys"]) if head is None or not set(HEAD_NAMES) & set(name.split("."))
    ]
    if lacking:
        raise ModelError(
            expected=f"all weights of {type(model).__name__} in {location.folder}",
            found=f"{len(lacking)} missing, as {lacking[0]}",
            fix="give a complete base of that architecture"
            if head
            else "for a BERT base: base.head=sequence-classification",
        )
    if head is not None:
        widen_head(model)
    return model, tuple(sorted({name.rpartition(".")[0] for name in info["missing_keys"]}))


def load_section(
    location: BaseLocation,
    section: Base,
    *,
    quantization: Quantization | None = None,
    compute_dtype: str | None = None,
    head: ClassHead | None = None,
) -> LoadedBase:
    """`load_base` as the recipe's section says; `quantization` and `compute_dtype` replace the section's."""
    return load_base(
        location,
        quantization=quantization or section.quantization,
        double_quantization=section.double_quantization,
        compute_dtype=compute_dtype or section.compute_dtype,
        device=section.device,
        head=head,
    )
