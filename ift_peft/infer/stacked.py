"""Many LoRA adapters on one base, each row of a batch with its own.

The adapters' matrices lie stacked, A (slots, r, in) and B (slots, r, out), so that a batch whose rows use different
adapters takes two batched products a layer (as in S-LoRA, arXiv:2311.03285, and Punica, arXiv:2310.18547) and no loop
over adapters. Ranks are brought to one by zeros. Slot 0 stays zero: the base alone.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ift_peft.errors import BusyError, ModelError
from ift_peft.infer.lora_files import MERGE, Lora, read_lora, shape_of

BASE = 0  # the slot of rows without an adapter
RANKS = 8  # ranks are stacked in multiples of it


class _Layer:
    """The stacked matrices of one module, and the forward hook that adds what they give to the module's output.

    The numbers are PEFT's: adapters are float32 whatever the base is; a quantised layer's delta is rounded before it
    is added, any other's after.
    """

    def __init__(self, module: nn.Module, slots: int, r: int, seen: _Seen) -> None:
        self.seen = seen
        shape = shape_of(module)
        assert shape is not None
        device = next(module.parameters()).device
        self.embedding = isinstance(module, nn.Embedding)
        self.rounds_first = type(module).__module__.startswith("bitsandbytes")
        # PEFT scales what it adds to a scaled embedding (Gemma) as well.
        self.scale = float(getattr(module, "embed_scale", 1.0)) if self.embedding else 1.0
        self.a = torch.zeros((slots, r, shape[0]), device=device)
        self.b = torch.zeros((slots, r, shape[1]), device=device)
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


class _Seen:
    """The (rows, tokens) of the batch that the model was last given."""

    shape = (0, 0)

    def __call__(self, model: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named["input_ids"] if "input_ids" in named else arguments[0]
        self.shape = (ids.shape[0], ids.shape[1])


class StackedAdapters:
    """LoRA adapters that load onto `model` and leave it at run time, each in time that does not depend on how many.

    What `select` says holds for every forward until it is called again; where threads share the model, whoever runs it
    does so inside `running`, and adapters are written between. Names are the caller's.
    """

    def __init__(self, model: nn.Module, *, max_adapters: int = 32, max_rank: int = 256) -> None:
        self.model, self.max_adapters, self.max_rank = model, max_adapters, max_rank
        self.lock = threading.RLock()
        self._next = threading.Lock()  # held by who waits to write, so that steps without a pause let it in
        self._loading = threading.Lock()  # one adapter at a time
        self._table = threading.Lock()  # of the following three
        self._slots: dict[str, int] = {}
        self._free = list(range(max_adapters, BASE, -1))
        self._users: Counter[int] = Counter()
        self._layers: dict[str, _Layer] = {}
        self._seen = _Seen()
        self._handle = model.register_forward_pre_hook(self._seen, with_kwargs=True)
        self._kept: list[int] = []  # the slots of the rows whose matrices are copied; -1: to be copied again
        self._capacity = 0  # rows that there is room for copies of
        self._selected: tuple[tuple[int, ...], bool] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        with self._table:
            return tuple(self._slots)

    def load(self, name: str, folder: Path) -> None:
        """Read PEFT's `folder` and make it the adapter `name`. The model waits for the copying only.

        Raises `ModelError` or `Faults` for what is not plain LoRA for this base or wider than `max_rank`, and for a
        name that is taken; `BusyError` where all `max_adapters` slots are in use.
        """
        with self._loading:
            self._require_free(name)
            weights = read_lora(Path(folder), self.model)
            widest = max(len(lora.a) for lora in weights.values())
            if widest > self.max_rank:
                raise ModelError(
                    expected=f"a rank of at most {self.max_rank}",
                    found=f"{widest} in {folder}",
                    fix=f"raise max_rank, or {MERGE}",
                )
            with self._table:
                slot = self._free.pop()
            try:
                with self._next, self.lock, torch.no_grad():
                    self._write(slot, weights)
            except BaseException:
                with self._table:
                    self._free.append(slot)
                raise
            with self._table:
                self._slots[name] = slot

    def remove(self, name: str) -> None:
        """Take an adapter away. Rows that use it keep it until they end; its slot is free after the last."""
        with self._table:
            slot = self._slots.pop(name, None)
            if slot is not None and not self._users[slot]:
                self._free.append(slot)
        if slot is None:
            raise self._unknown(name)

    def acquire(self, name: str | None) -> int:
        """The slot of an adapter, or of the base, held until `release`. Raises `ModelError` for an unknown name."""
        if name is None:
            return BASE
        with self._table:
            slot = self._slots.get(name)
            if slot is not None:
                self._users[slot] += 1
                return slot
        raise self._unknown(name)

    def release(self, slot: int) -> None:
        if slot == BASE:
            return
        with self._table:
            self._users[slot] -= 1
            if not self._users[slot]:
                del self._users[slot]
                if slot not in self._slots.values():
                    self._free.append(slot)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold `lock` for a `select` and the forwards after it, once whoever waits to write has written."""
        with self._next:
            pass
        with self.lock:
            yield

    @torch.no_grad()
    def select(self, slots: Sequence[int], *, keep: bool = False) -> None:
        """The slot of each row of the batches to come; one slot alone: of all rows, however many.

        With `keep` the rows' matrices stay copied between calls, and only those of rows that changed are copied
        again: for decoding, where the rows are nearly the same from step to step.
        """
        if (tuple(slots), keep) == self._selected:
            return
        self._selected = None  # until every layer follows: one may find no memory for its copies
        used = set(slots)
        if len(used) == 1:
            (slot,) = used
            for layer in self._layers.values():
                layer.all_of(slot)
        else:
            self._select_rows(slots, keep=keep)
        self._selected = (tuple(slots), keep)

    def _select_rows(self, slots: Sequence[int], *, keep: bool) -> None:
        used, changed, capacity = set(slots), list[int](), max(self._capacity, len(slots))
        if keep:
            before, self._kept = self._kept + [-1] * len(slots), []
            changed = [row for row, slot in enumerate(slots) if before[row] != slot]
        chosen, where = torch.tensor(slots), torch.tensor(changed, dtype=torch.long)
        for layer in self._layers.values():
            if keep:  # also where none of these rows adapts it: its copies must be those that `_kept` tells of
                layer.keep(chosen.to(layer.a.device), capacity, where.to(layer.a.device))
            elif used & layer.used:
                layer.each_of(chosen.to(layer.a.device))
            if not used & layer.used:
                layer.off()
        if keep:
            self._kept, self._capacity = list(slots), capacity

    @contextmanager
    def holding(self, name: str | None) -> Iterator[int]:
        """`acquire` and `release` around a block."""
        slot = self.acquire(name)
        try:
            yield slot
        finally:
            self.release(slot)

    def close(self) -> None:
        """Leave the model as it was."""
        with self.lock:
            self._handle.remove()
            for layer in self._layers.values():
                layer.handle.remove()
            self._layers.clear()

    def _write(self, slot: int, weights: dict[str, Lora]) -> None:
        """Copy weights into a slot, and zeros wherever its last adapter had any and this one has none."""
        modules = dict(self.model.named_modules())
        self._kept = [-1 if kept == slot else kept for kept in self._kept]
        self._selected = None
        for name, lora in weights.items():
            if name not in self._layers:
                self._layers[name] = _Layer(modules[name], self.max_adapters + 1, _rounded(len(lora.a)), self._seen)
                self._layers[name].off()
        for name, layer in self._layers.items():
            layer.write(slot, weights.get(name))

    def _require_free(self, name: str) -> None:
        with self._table:
            taken, full = name in self._slots, not self._free
        if taken:
            raise ModelError(expected="a new adapter name", found=f"{name!r}, loaded already", fix="remove it first")
        if full:
            raise BusyError(
                expected=f"one of {self.max_adapters} slots free for {name!r}",
                found="none",
                fix="remove an adapter whose requests have ended, or raise max_adapters",
            )

    def _unknown(self, name: str) -> ModelError:
        return ModelError(
            expected=f"an adapter out of {', '.join(self.names) or 'none loaded'}",
            found=repr(name),
            fix="load it first",
        )


def _rounded(r: int) -> int:
    return -(-r // RANKS) * RANKS
