"""Where memory runs out: a micro-batch that is cut until it fits, and errors that say which setting needs less."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from ift_peft.errors import OutOfMemory, first_line, is_out_of_memory

Batch = dict[str, Tensor]


def parts_of(batch: Batch, rows: int) -> list[Batch]:
    """A batch cut into parts of at most `rows` rows, in their order; every tensor has one entry for each row."""
    count = len(batch["input_ids"])
    if count <= rows:
        return [batch]
    return [{name: column[at : at + rows] for name, column in batch.items()} for at in range(0, count, rows)]


def has_dropout(model: Any) -> bool:
    """Whether training draws masks: by modules, as adapters do, or, as many bases do, by a number in the config."""
    if any(module.p > 0 for module in model.modules() if isinstance(module, _DropoutNd)):
        return True
    settings = model.config.get_text_config().to_dict()
    return any(
        value > 0 for name, value in settings.items() if ("dropout" in name or "pdrop" in name) and _is_number(value)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@contextmanager
def whole_or_undone(parameters: Sequence[Any], device: torch.device) -> Iterator[None]:
    """Add the gradients of what is done inside to those before; after an error they, and random numbers, are as before.

    A backward pass that breaks off has added some of its gradients already. They are therefore collected apart, which
    costs memory only from the second micro-batch of a step on.
    """
    before = [parameter.grad for parameter in parameters]
    drawn = torch.get_rng_state()
    drawn_there = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    except BaseException:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
        torch.set_rng_state(drawn)
        if drawn_there is not None:
            torch.cuda.set_rng_state(drawn_there, device)
        raise
    for parameter, gradient in zip(parameters, before, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            parameter.grad.add_(gradient)


def give_memory_back() -> None:
    """Let go of what an attempt left behind: it lies in cycles, and the allocator of a GPU keeps what it had."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def memory_for(what: str, *, fix: str) -> Iterator[None]:
    """Raises `OutOfMemory`, which names `what` and how to need less, where memory runs out inside."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(expected=f"memory for {what}", found=first_line(error), fix=fix) from None
