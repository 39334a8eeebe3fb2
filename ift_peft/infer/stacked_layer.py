"""One module's matrices of many LoRA adapters, and what they add to the module's output, row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ift_peft.errors import ModelError
from ift_peft.infer.lora_files import Lora, shape_of

BASE = 0  # the slot of rows without an adapter
RANKS = 8  # ranks are stacked in multiples of it


class StackedLayer:
    """The stacked matrices of one module, and the forward hook that adds what they give to the module's output.

    The numbers are PEFT's: adapters are float32 whatever the base is; a quantised layer's delta is rounded before it
    is added, any other's after.
    """

    def __init__(self, module: nn.Module, slots: int, r: int, seen: Seen) -> None:
        self.seen = seen
        shape = shape_of(module)
        assert shape is not None
        device = next(module.parameters()).device
        self.embedding = isinstance(module, nn.Embedding)
        self.rounds_first = type(module).__module__.startswith("bitsandbytes")
        # PEFT scales what it adds to a scaled embedding (Gemma) as well.
        self.scale = float(getattr(module, "embed_scale", 1.0)) if self.embedding else 1.0
        self.a = torch.zeros((slots, _rounded(r), shape[0]), device=device)
        self.b = torch.zeros((slots, _rounded(r), shape[1]), device=device)
        self.used: set[int] = set()  # slots whose adapters adapt this module
        self.slot: int | None = None  # all rows use it; else each row its own, of the following
        self.rows: tuple[Tensor, Tensor] | None = None
        self.kept: tuple[Tensor, Tensor] | None = None
        self.index: Tensor | None = None
        self.handle = module.register_forward_hook(self._add)

    @property
    def r(self) -> int:
        return self.a.shape[1]

    def write(self, slot: int, lora: Lora | None) -> None:
        """Put an adapter's matrices, or nothing, into a slot; wider ones widen all."""
        if lora is not None and len(lora.a) > self.r:
            more = _rounded(len(lora.a)) - self.r
            a = torch.cat([self.a, self.a.new_zeros(len(self.a), more, self.a.shape[2])], dim=1)
            b = torch.cat([self.b, self.b.new_zeros(len(self.b), more, self.b.shape[2])], dim=1)
            self.a, self.b, self.kept = a, b, None  # together, as there may have been no room for the second
        self.a[slot].zero_()
        self.b[slot].zero_()
        self.used.discard(slot)
        if lora is not None:
            self.a[slot, : len(lora.a)] = lora.a
            self.b[slot, : len(lora.b)] = lora.b * self.scale
            self.used.add(slot)

    def off(self) -> None:
        self.slot, self.rows = BASE, None

    def all_of(self, slot: int) -> None:
        self.slot, self.rows = slot if slot in self.used else BASE, None

    def each_of(self, slots: Tensor) -> None:
        """Each row with its own slot, its matrices copied for the one batch."""
        a = self.a if self.embedding else self.a.index_select(0, slots)
        self.slot, self.index, self.rows = None, slots, (a, self.b.index_select(0, slots))

    def keep(self, slots: Tensor, capacity: int, changed: Tensor | None) -> None:
        """Each row with its own slot; only the matrices of rows that `changed` (None: all) are copied."""
        if self.kept is None or len(self.kept[1]) < capacity:
            shape_a = (0,) if self.embedding else (capacity, *self.a.shape[1:])
            self.kept = (self.a.new_zeros(shape_a), self.b.new_zeros((capacity, *self.b.shape[1:])))
            changed = None
        a, b = self.kept
        where = torch.arange(len(slots), device=slots.device) if changed is None else changed
        if len(where):
            if not self.embedding:
                a[where] = self.a[slots[where]]
            b[where] = self.b[slots[where]]
        self.slot, self.index = None, slots
        self.rows = (self.a if self.embedding else a[: len(slots)], b[: len(slots)])

    def _add(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The module's output, (rows, tokens, out), with each row's delta."""
        if self.slot == BASE:
            return None
        given = arguments[0]
        if self.slot is not None:
            inner = self.a[self.slot].T[given] if self.embedding else given.float() @ self.a[self.slot].T
            delta = inner @ self.b[self.slot]
        else:
            assert self.rows is not None and self.index is not None
            a, b = self.rows
            if self.embedding:
                inner = a.transpose(1, 2)[self.index[:, None], given]
            else:
                inner = torch.bmm(self._by_row(given).float(), a.transpose(1, 2))
            if output.dtype == torch.float32 and output.dim() == 3:
                return torch.baddbmm(output, inner, b)
            delta = torch.bmm(inner, b).view(output.shape)
        if self.rounds_first:
            return output + delta.to(output.dtype)
        return (output + delta).to(output.dtype)

    def _by_row(self, given: Tensor) -> Tensor:
        """(rows, tokens, in), also of a layer that is given all tokens in one dimension, as OPT's are."""
        if given.dim() == 3:
            return given
        rows, tokens = self.seen.shape
        if given.dim() != 2 or len(given) != rows * tokens:  # as tokens that are routed to an expert
            raise ModelError(
                expected="adapted layers to be given all tokens of a batch where its adapters are mixed",
                found=f"{len(given)} of {rows * tokens}",
                fix="adapt other modules, or ask for one adapter at a time",
            )
        return given.view(rows, tokens, -1)


class Seen:
    """The (rows, tokens) of the batch that the model was last given."""

    shape = (0, 0)

    def __call__(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named["input_ids"] if "input_ids" in named else arguments[0]
        self.shape = (ids.shape[0], ids.shape[1])


def _rounded(r: int) -> int:
    return -(-r // RANKS) * RANKS
