"""Keys and values of rows of different lengths, that join and leave one by one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from ift_peft.errors import ModelError
from ift_peft.model.configuration import positions

ROOM, MOST_ROOM = 64, 512  # columns that are allocated beyond those in use


class RowsLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, columns, width), in buffers that are wider and longer than in use.

    All rows end in the same column, so that masks by column distance, as those of sliding windows, hold for each.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.held: tuple[Tensor, Tensor] | None = None
        self.rows = self.start = self.end = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns, and give all in use."""
        added = key_states.shape[-2]
        self.reserve(self.rows, self.end + added, key_states, value_states)
        assert self.held is not None
        keys, values = self.held
        until = self.end + added
        keys[: self.rows, :, self.end : until] = key_states
        values[: self.rows, :, self.end : until] = value_states
        self.end = until
        return keys[: self.rows, :, self.start : until], values[: self.rows, :, self.start : until]

    def reserve(self, rows: int, columns: int, keys: Tensor, values: Tensor) -> None:
        """Buffers of at least this many rows and columns after `start`; what is unused before `start` goes first."""
        have = (0, 0) if self.held is None else (self.held[0].shape[0], self.held[0].shape[2])
        if rows <= have[0] and columns <= have[1]:
            return
        width = self.end - self.start
        columns -= self.start
        # By half as much again, so that growing costs few copies; of what is needed now, not of what once was.
        size = (
            have[0] if rows <= have[0] <= 2 * rows else rows + rows // 2,
            columns + min(max(columns // 2, ROOM), MOST_ROOM),
        )
        moved = []
        for number, like in enumerate((keys, values)):
            new = like.new_zeros((size[0], like.shape[1], size[1], like.shape[3]))
            if self.held is not None:
                new[: self.rows, :, :width] = self.held[number][: self.rows, :, self.start : self.end]
            moved.append(new)
        self.held, self.start, self.end = (moved[0], moved[1]), 0, width

    def join(self, keys: Tensor, values: Tensor) -> None:
        """One more row, of (heads, columns, width)."""
        length = keys.shape[1]
        short = length - (self.end - self.start)
        self.reserve(self.rows + 1, self.end + max(0, short), keys[None], values[None])
        assert self.held is not None
        if short > 0 and self.start >= short:
            self.start -= short
        elif short > 0:
            for part in self.held:  # the others move to the right
                others = part[: self.rows, :, self.start : self.end].clone()
                part[: self.rows, :, self.start + short : self.end + short] = others
                part[: self.rows, :, : self.start + short] = 0
            self.end += short
        for part, new in zip(self.held, (keys, values), strict=True):
            part[self.rows, :, : self.end - length] = 0  # masked columns count as 0 x what is there, which may be NaN
            part[self.rows, :, self.end - length : self.end] = new
        self.rows += 1

    def leave(self, row: int) -> None:
        """The last row takes the place of one that ends."""
        self.rows -= 1
        if not self.rows:
            self.held, self.start, self.end = None, 0, 0
        elif self.held is not None and row != self.rows:
            for part in self.held:
                part[row, :, : self.end] = part[self.rows, :, : self.end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.end - self.start + query_length, 0

    def get_seq_length(self) -> int:
        return self.end - self.start

    def get_max_length(self) -> int:
        return -1


class RowsCache(Cache):
    """A cache whose rows come from prompts that were run by themselves, and go when they end.

    `lengths` has the tokens that each row holds; columns before them are padding.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RowsLayer)
        self.lengths: list[int] = []

    def join(self, prompts: DynamicCache, row: int, length: int) -> None:
        """The last `length` columns of one row of a cache of prompts become the last row."""
        while len(self.layers) < len(prompts.layers):
            self.layers.append(RowsLayer())
        for own, other in zip(self.layers, prompts.layers, strict=True):
            own.join(other.keys[row, :, -length:], other.values[row, :, -length:])
        self.lengths.append(length)
        self._narrow()

    def leave(self, row: int) -> None:
        for layer in self.layers:
            layer.leave(row)
        last = self.lengths.pop()
        if row < len(self.lengths):
            self.lengths[row] = last
        self._narrow()

    def inputs(self, tokens: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """What a forward with one more token for each row takes; the caller adds `past_key_values`."""
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        width = max(self.lengths)
        mask = (torch.arange(width + 1, device=device) >= width - lengths).long()
        self.lengths = [length + 1 for length in self.lengths]
        return {
            "input_ids": torch.tensor(tokens, device=device)[:, None],
            "attention_mask": mask,
            "position_ids": lengths,
        }

    def _narrow(self) -> None:
        """Leave out columns in which no row has a token any more."""
        width = max(self.lengths, default=0)
        for layer in self.layers:
            layer.start = layer.end - width


def padded(prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> dict[str, Tensor]:
    """What a forward over prompts, padded on the left, takes."""
    width = max(map(len, prompts))
    rows = [[pad_token_id] * (width - len(ids)) + list(ids) for ids in prompts]
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)[:, None]
    columns = torch.arange(width, device=device) - (width - lengths)
    return {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": (columns >= 0).long(),
        "position_ids": columns.clamp(min=0),
    }


def alike_positions(config: Any) -> int | None:
    """Positions that a row can have whatever the length of others in its batch; None where nothing limits them.

    LongRoPE (arXiv:2402.13753) turns all rows otherwise once one is longer than the base was at first.
    """
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    limits = [
        int(rope["original_max_position_embeddings"])
        for rope in (ropes, *ropes.values())  # of the base, or of each kind of its layers
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope"
    ]
    whole = positions(config)
    return min(limits if whole is None else [*limits, whole], default=None)


class RowsModel:
    """A causal language model as rows are run through it. Raises `ModelError` for one that padding would change."""

    def __init__(self, model: Any, pad_token_id: int) -> None:
        self.model, self.pad_token_id = model, pad_token_id
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._takes = set(inspect.signature(inner.forward).parameters)
        self.device = next(model.parameters()).device
        model.eval()
        if fault := self._unfit():
            raise ModelError(
                expected="a base whose rows of different lengths can be run together",
                found=f"{type(inner).__name__}, {fault}",
                fix="answer one prompt at a time (transformers' generate)",
            )

    @torch.no_grad()
    def prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, DynamicCache]:
        """Logits (prompts, vocabulary) after each prompt, and their keys and values, all columns of every layer."""
        cache = DynamicCache()  # of no config: a sliding window's layers must hold all that other rows shift
        return self._forward(padded(prompts, self.pad_token_id, self.device), cache), cache

    @torch.no_grad()
    def step(self, tokens: Sequence[int], cache: RowsCache) -> Tensor:
        """Logits (rows, vocabulary) after one more token for each row."""
        return self._forward(cache.inputs(tokens, self.device), cache)

    def _forward(self, inputs: dict[str, Tensor], cache: Cache) -> Tensor:
        if "position_ids" not in self._takes:
            inputs.pop("position_ids")
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = 1  # type: ignore[assignment]
        logits: Tensor = self.model(**inputs, past_key_values=cache, use_cache=True).logits
        return logits[:, -1]

    def _unfit(self) -> str | None:
        """Why the model cannot be used, by its parts and by trying: two rows together against each alone."""
        if not {"past_key_values", "attention_mask"} <= self._takes:
            return "whose forward takes no past_key_values"
        try:
            layers = DynamicCache(config=self.model.config).layers
        except (KeyError, AttributeError, NotImplementedError) as error:
            return f"whose cache is unknown ({error})"
        other = {type(layer).__name__ for layer in layers} - {
            DynamicLayer.__name__,
            DynamicSlidingWindowLayer.__name__,
        }
        if other or "chunked_attention" in (getattr(self.model.config, "layer_types", None) or ()):
            return f"with layers of {', '.join(sorted(other)) or 'chunked attention'}"
        return self._try()

    def _try(self) -> str | None:
        size = len(self.model.get_input_embeddings().weight)
        one, two = ([(7 * i + start) % size for i in range(n)] for start, n in ((3, 4), (5, 7)))
        wanted = torch.cat([self.prompts([[*row, 1]])[0] for row in (one, two)]).float()
        cache = RowsCache()
        _, prompts = self.prompts([one, two])
        for number, row in enumerate((one, two)):
            cache.join(prompts, number, len(row))
        off = (self.step([1, 1], cache).float() - wanted).abs().max() / wanted.std().clamp(min=1e-6)
        quantised = getattr(self.model, "is_quantized", False)
        exact = not quantised and all(parameter.dtype == torch.float32 for parameter in self.model.parameters())
        if not off <= (0.01 if exact else 0.5):
            return f"whose logits change by {off:.2g} standard deviations where another row pads them"
        return None
