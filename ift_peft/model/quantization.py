"""Weights packed by bitsandbytes, and unpacked again: once on CPU, or to be stored as plain ones."""

from __future__ import annotations

import psutil
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ift_peft.model.quiet import quiet
from ift_peft.sections import Quantization


def quantization_config(quantization: Quantization, double: bool, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers is given to pack weights while it loads them; `dtype` is what they are multiplied in."""
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )


def dequantize_once(model: PreTrainedModel, dtype: torch.dtype, quantization: str) -> str:
    """Unpack 4-bit weights to `dtype` for good where memory allows it; the note that says which."""
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


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """A quantised base with its weights as plain float32, unpacked by bitsandbytes, on any device."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    with quiet():
        if any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules()):
            model.dequantize(dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    model.config.dtype = torch.float32
    _transpose_back(model)
    return model


def _transpose_back(model: PreTrainedModel) -> None:
    """Make Conv1D again of what bitsandbytes made linear modules of, so that the model is stored as its base is."""
    with torch.device("meta"):
        bare = type(model)(model.config)
    for name, module in bare.named_modules():
        linear = model.get_submodule(name)
        if isinstance(module, Conv1D) and isinstance(linear, nn.Linear):
            again = Conv1D(linear.out_features, linear.in_features)
            again.weight, again.bias = nn.Parameter(linear.weight.detach().T.contiguous()), linear.bias
            model.set_submodule(name, again)
