"""The rows that an engine decodes together: they join after their prompts were run, and leave at any step."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ift_peft.errors import ModelError
from ift_peft.infer.answering import Row
from ift_peft.infer.rows import RowsCache, RowsModel
from ift_peft.infer.stacked import StackedAdapters


class Batch:
    """Rows of one base, each with its adapter. For whoever holds the model.

    A row that fails is told so by its stream, and leaves. Raises `ModelError` for a base whose rows of different
    lengths cannot be run together.
    """

    def __init__(
        self, model: Any, *, pad_token_id: int, end_token_ids: Collection[int], adapters: StackedAdapters | None
    ) -> None:
        self.rows: list[Row] = []
        self.joining: list[Row] = []  # no longer waiting, and not yet among `rows`
        self._end_token_ids, self._adapters = end_token_ids, adapters
        self._cache = RowsCache()
        self._select([0])
        self._model = RowsModel(model, pad_token_id)

    def step(self) -> None:
        """Run the prompts of those that join, then one token for each row."""
        if self.joining:
            self._run_prompts(list(self.joining))
        if self.rows:
            self._run_rows()

    def _run_prompts(self, rows: list[Row]) -> None:
        """Run prompts together, take the first token of each, and let those that go on join the batch."""
        failed: Exception | None = None
        try:
            self._select([row.slot for row in rows])
            logits, cache = self._model.prompts([row.stream.request.prompt for row in rows])
            likeliest = _likeliest(logits)
        except Exception as error:
            failed = _emptied(error)
        if failed is not None:
            if len(rows) == 1:  # one that fails leaves the others as they are
                self.joining.remove(rows[0])
                self._fail(rows[0], failed)
            else:  # outside of the `except`, which would hold what the failed batch took
                for row in rows:
                    if row in self.joining:
                        self._run_prompts([row])
            return
        ended = self._advance(rows, logits, likeliest)
        try:
            for number, row in enumerate(rows):
                if row not in ended:
                    self._cache.join(cache, number, len(row.stream.request.prompt))
                    self.rows.append(row)
                self.joining.remove(row)
                if row in ended:
                    self.release(row)
        except Exception as error:
            self.lose(error)

    def _run_rows(self) -> None:
        try:
            self._select([row.slot for row in self.rows], keep=True)
            logits = self._model.step([row.token for row in self.rows], self._cache)
            likeliest = _likeliest(logits)
        except Exception as error:
            self.lose(error)
            return
        for row in self._advance(self.rows, logits, likeliest):
            self.leave(row)

    def lose(self, error: BaseException, waiting: Sequence[Row] = ()) -> None:
        """Fail all rows and those that were to join, as what the cache holds is unknown; and those that are waiting."""
        lost = [*dict.fromkeys([*self.joining, *self.rows]), *waiting]
        self.joining, self.rows, self._cache = [], [], RowsCache()
        if not isinstance(error, Exception):
            error = RuntimeError(f"the engine was interrupted by {type(error).__name__}")
        for row in lost:
            self._fail(row, error)

    def _advance(self, rows: Sequence[Row], logits: Tensor, likeliest: Sequence[int | None]) -> list[Row]:
        """One more token for each row; the rows that ended, or failed, with it."""
        ended = []
        for row, token, own in zip(rows, likeliest, logits, strict=True):
            try:
                if token is None:
                    raise ModelError(
                        expected="finite logits",
                        found=f"NaN or infinity for {row.stream.request.adapter or 'the base'}",
                        fix="check the adapter's weights, or load the base in float32 or bfloat16",
                    )
                reason = row.take(row.choose(own, token), self._end_token_ids)
            except Exception as error:
                row.stream.fail(_emptied(error))
                ended.append(row)
                continue
            if reason is not None:
                row.stream.end(reason)
                ended.append(row)
        return ended

    def leave(self, row: Row) -> None:
        """Take a row out of the batch; the last takes its place."""
        at = self.rows.index(row)
        self._cache.leave(at)
        last = self.rows.pop()
        if at < len(self.rows):
            self.rows[at] = last
        self.release(row)

    def _fail(self, row: Row, error: Exception) -> None:
        if not row.stream.done:
            row.stream.fail(_emptied(error))
        self.release(row)

    def release(self, row: Row) -> None:
        if self._adapters is not None:
            self._adapters.release(row.slot)

    def _select(self, slots: Sequence[int], *, keep: bool = False) -> None:
        if self._adapters is not None:
            self._adapters.select(slots, keep=keep)


def _likeliest(logits: Tensor) -> list[int | None]:
    """The likeliest token of each row; None where a logit is no number. Where the model failed late, this raises."""
    greatest, tokens = logits.max(dim=-1)
    finite = torch.isfinite(greatest).tolist()
    return [token if whole else None for token, whole in zip(tokens.tolist(), finite, strict=True)]


def _emptied(error: Exception) -> Exception:
    """The error, to be kept, without the frames that it came through and their tensors; a note tells of them."""
    if error.__traceback__ is not None:
        error.add_note("".join(traceback.format_tb(error.__traceback__)).rstrip())
    one: BaseException | None = error
    while one is not None:
        one.__traceback__ = None
        one = one.__context__
    return error
