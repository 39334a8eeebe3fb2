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

import torch
from torch import nn

from ift_peft.errors import BusyError, ModelError
from ift_peft.infer.lora_files import MERGE, Lora, read_lora
from ift_peft.infer.stacked_layer import BASE, Seen, StackedLayer


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
        self._layers: dict[str, StackedLayer] = {}
        self._seen = Seen()
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
                self._layers[name] = StackedLayer(modules[name], self.max_adapters + 1, len(lora.a), self._seen)
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
