"""Loading a base model, quantised or not, on the device at hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ift_peft.errors import ModelError, first_line
from ift_peft.model.tokenizer import BaseLocation
from ift_peft.sections import Base, Quantization

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LoadedBase:
    """A base ready for an adapter. `notes` are the choices made for the user that the run must record."""

    model: PreTrainedModel
    device: torch.device
    compute_dtype: torch.dtype
    quantization: Quantization
    notes: list[str] = field(default_factory=list)


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
) -> LoadedBase:
    """The base in evaluation mode.

    On CPU, nf4 and fp4 weights are dequantised once and kept, memory permitting: the numbers are those of the
    quantised base, the speed that of the plain one. Raises `ModelError` for weights that cannot be loaded.
    """
    place = choose_device(device)
    dtype = choose_dtype(compute_dtype, place)
    notes: list[str] = []
    arguments: dict[str, Any] = {"dtype": dtype}
    if quantization != "none":
        arguments["quantization_config"] = _quantization_config(quantization, double_quantization, dtype)
        arguments["device_map"] = {"": str(place)}
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(
                location.folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, **arguments
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                expected=f"a causal language model in {location.folder}",
                found=first_line(error),
                fix="check that its architecture is known to the installed transformers and its weights are complete",
            ) from error
        if place.type == "cpu" and quantization in ("nf4", "fp4"):
            notes.append(_dequantize_once(model, dtype, quantization))
    if quantization == "none":
        model.to(place)
    model.eval()
    model.name_or_path = str(location.folder)  # PEFT looks here, not on the Hub, for the base's vocabulary size
    return LoadedBase(model, place, dtype, quantization, notes)


def load_section(
    location: BaseLocation, section: Base, *, quantization: Quantization | None = None, compute_dtype: str | None = None
) -> LoadedBase:
    """`load_base` as the recipe's section says; `quantization` and `compute_dtype` replace the section's."""
    return load_base(
        location,
        quantization=quantization or section.quantization,
        double_quantization=section.double_quantization,
        compute_dtype=compute_dtype or section.compute_dtype,
        device=section.device,
    )


def _quantization_config(quantization: Quantization, double: bool, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )


def _dequantize_once(model: PreTrainedModel, dtype: torch.dtype, quantization: str) -> str:
    from bitsandbytes.nn import Linear4bit

    quantised = [module for module in model.modules() if isinstance(module, Linear4bit)]
    needed = sum(module.in_features * module.out_features for module in quantised) * dtype.itemsize
    available = psutil.virtual_memory().available
    if 2 * needed > available:
        return (
            f"{quantization} weights stay packed and are dequantised in every step, which is slow on CPU: "
            f"unpacked they take {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are free"
        )
    model.dequantize(dtype=dtype)
    model.config.dtype = dtype
    model.is_loaded_in_4bit = False  # transformers leaves it set, and TRL would then round the adapter to bfloat16
    name = str(dtype).removeprefix("torch.")
    return f"{quantization} weights dequantised once to {name}: same numbers, no unpacking in every step"


def skeleton(location: BaseLocation) -> PreTrainedModel:
    """The base's modules without weights (on the meta device): enough to check what an adapter would match."""
    with quiet():
        try:
            config = AutoConfig.from_pretrained(location.folder, trust_remote_code=False, local_files_only=True)
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                expected=f"the config of a causal language model in {location.folder}",
                found=first_line(error),
                fix="choose a base that transformers' AutoModelForCausalLM knows",
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice; errors still show."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\b")
            # PEFT puts the whole embedding into checkpoints of an adapter on it; the final adapter goes without.
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
            # An adapter on a tied embedding: merging unties it (adapters/merge.py).
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
