"""Memory that training takes: foreseen before weights are loaded, and measured.

What autograd keeps for the backward pass is not written down as a formula for each architecture (as Korthikanti et al.
2022, arXiv:2205.05198, do for GPT): the base's own forward runs once over tensors without storage, and what it saves is
counted. That covers attention without its matrices, frozen weights whose inputs need not be kept, and grouped heads.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ift_peft.errors import ModelError, first_line
from ift_peft.model.adapter import peft_config
from ift_peft.model.configuration import skeleton
from ift_peft.model.quiet import quiet
from ift_peft.model.tokenizer import BaseLocation
from ift_peft.sections import Adapter, Head, Quantization

# Weight, gradient and AdamW's two moments of each trained parameter, all in float32 (PEFT keeps adapters so).
TRAINED_BYTES = 4 * 4
# Of a packed weight: four bits, and a float32 for each block of 64, or with double quantisation a byte for each and a
# float32 for each 256 of them (Dettmers et al. 2023, arXiv:2305.14314, section 3).
FOUR_BITS = 0.5 + 4 / 64
FOUR_BITS_DOUBLE = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Batch:
    """The largest batch: rows, tokens of its longest row, and the positions whose logits are made in each row."""

    rows: int
    length: int
    positions: int


@dataclass(frozen=True)
class Foreseen:
    """Bytes that tensors hold where a step needs most.

    Checked on `tiny` and on a Llama of 260,032 parameters, in float32 on a CPU: within 10 % of what the process grew by
    where the allocator gives memory back at once (MALLOC_MMAP_THRESHOLD_=65536). glibc's does not by itself: there the
    same steps grew it by up to 2.5 times as much. Not checked on a GPU, where kernels save a little more or less, nor
    with activation checkpointing.
    """

    weights: int
    adapter: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def weight_bytes(model: PreTrainedModel, dtype: torch.dtype, *, quantization: Quantization, double: bool) -> int:
    """Bytes of a base's weights as they lie in memory; only linear modules other than the head are quantised."""
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    head = model.get_output_embeddings()
    packed = 0
    if quantization != "none":
        linears = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
        packed = sum(module.weight.numel() for module in linears)
    four = FOUR_BITS_DOUBLE if double else FOUR_BITS
    each = {"none": 0.0, "int8": 1.0, "nf4": four, "fp4": four}[quantization]
    return math.ceil(packed * each) + (int(sum(sizes.values())) - packed) * int(dtype.itemsize)


def foresee(
    location: BaseLocation,
    adapter: Adapter,
    batch: Batch,
    *,
    dtype: torch.dtype,
    quantization: Quantization = "none",
    double_quantization: bool = True,
    checkpointing: bool = False,
    head: Head = "causal-lm",
) -> Foreseen:
    """What training `adapter` over the base at `location` needs in its largest batch; loads no weights.

    `quantization` is what stays packed. Raises `ModelError` for a base whose forward cannot be run without numbers,
    as where it depends on them which experts a token goes to.
    """
    bare = skeleton(location, head).to(dtype)
    text = bare.config.get_text_config()  # of a base that also sees or hears, the part that reads
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0  # a classifier's head looks for it
    weights = weight_bytes(bare, dtype, quantization=quantization, double=double_quantization)
    layers = int(getattr(text, "num_hidden_layers", 1))
    hidden = int(getattr(text, "hidden_size", 0))
    with quiet():
        config = peft_config(adapter, bare, base_name=str(location.folder), revision=location.revision, head=head)
        model = get_peft_model(bare, config, low_cpu_mem_usage=True).train()
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        try:
            activations, logits = _saved(model, batch, head)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise ModelError(
                expected="a base whose forward runs without numbers",
                found=first_line(error),
                fix="nothing: its memory is not foreseen",
            ) from error
    if checkpointing:  # the input of each layer, and all of the one that is being gone through again
        activations = activations // layers + layers * batch.rows * batch.length * hidden * dtype.itemsize
    return Foreseen(weights, trained * TRAINED_BYTES, activations, logits)


class _Head(nn.Module):
    """The model up to the logits of a row's last positions, or of its classes; a module, for `functional_call`."""

    def __init__(self, model: Any, head: Head) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, ids: torch.Tensor, positions: int) -> torch.Tensor:
        causal = {"use_cache": False, "logits_to_keep": positions} if self.head == "causal-lm" else {}
        logits: torch.Tensor = self.model(input_ids=ids, **causal).logits
        return logits


def _saved(model: Any, batch: Batch, head: Head) -> tuple[int, int]:
    """Bytes that autograd keeps of the forward; of logits, their softmax and the gradient of either, in float32.

    Fake tensors make transformers build the mask of a padded batch, which most batches are.
    """
    kept: dict[int, Any] = {}
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what cannot be run is told once
    with FakeTensorMode():
        tensors = {
            f"model.{name}": torch.empty(one.shape, dtype=one.dtype, requires_grad=one.requires_grad)
            for name, one in (*model.named_parameters(), *model.named_buffers())
        }
        own = {one.untyped_storage()._cdata for one in tensors.values()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage  # held, so that no other gets its number
            return tensor

        ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = torch.func.functional_call(_Head(model, head), tensors, (ids, batch.positions))
        return sum(storage.nbytes() for storage in kept.values()), 4 * 4 * logits.numel()


def free_bytes(device: torch.device) -> int:
    """What is free on the device: memory that programs can get without swapping, or that of the GPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


class Meter:
    """Measures the memory of a stretch of work, from when it is made to `read`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_before = _peak_rss()
        self.resettable = _reset_peak()
        self.before = int(psutil.Process().memory_info().rss)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.allocated = int(torch.cuda.memory_allocated(device))

    def read(self) -> dict[str, int]:
        """Bytes: `peak_rss` of the process so far, `rss_before` the stretch, and its own `peak_rss_during`.

        The last is missing where the system does not let a process reset its peak. On a GPU also what was allocated
        there before, and at most.
        """
        during = _peak_rss()
        found = {"peak_rss_bytes": max(self.peak_before, during), "rss_before_training_bytes": self.before}
        if self.resettable:
            found["peak_rss_in_training_bytes"] = during
        if self.device.type == "cuda":
            found["cuda_before_training_bytes"] = self.allocated
            found["peak_cuda_in_training_bytes"] = int(torch.cuda.max_memory_allocated(self.device))
        return found


def _peak_rss() -> int:
    """Where Linux tells it, the peak of this program: getrusage begins with that of the one that started it."""
    import resource

    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text("ascii", errors="replace"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _reset_peak() -> bool:
    """Set the process's peak to what it holds now (proc(5), clear_refs); False where there is no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return False
    return True
