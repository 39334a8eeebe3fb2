"""Rows that must fit `max_length`: their text is shortened, never their answer, and never in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ift_peft.data.render import Rendered, Renderer, without_labels
from ift_peft.data.row import Row
from ift_peft.data.rows import raise_faults
from ift_peft.errors import DataError, IftPeftError

BATCH = 1000


@dataclass(frozen=True)
class Fitted:
    """Rows with their rendering, and how many had to be shortened or left out to fit."""

    rows: list[Row]
    rendered: list[Rendered]
    truncated: int
    dropped: int

    def notes(self, name: str, max_length: int | None) -> list[str]:
        """What happened to rows that were too long, in words."""
        notes = []
        if self.truncated:
            notes.append(f"{self.truncated} {name} rows over {max_length} tokens: the end of their text was cut")
        if self.dropped:
            notes.append(f"{self.dropped} {name} rows over {max_length} tokens were left out (data.overlong=drop)")
        return notes

    @property
    def tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rendered)

    @property
    def supervised_tokens(self) -> int:
        return sum(row.supervised for row in self.rendered)


def fit_rows(
    rows: Sequence[Row],
    renderer: Renderer,
    *,
    max_length: int | None,
    overlong: Literal["truncate", "drop", "error"],
) -> Fitted:
    """Render `rows` so that each has at most `max_length` tokens (None: any number).

    Raises `Faults` naming every row that cannot fit, and every row left without a supervised token.
    """
    kept: list[Row] = []
    rendered: list[Rendered] = []
    faults: list[IftPeftError] = []
    truncated = dropped = 0
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        for row, ids in _render(batch, renderer, faults):
            if max_length is None or len(ids.input_ids) <= max_length:
                kept.append(row)
                rendered.append(ids)
            elif overlong == "drop":
                dropped += 1
            elif overlong == "truncate" and (shorter := shorten(row, ids, renderer, max_length=max_length)) is not None:
                kept.append(shorter[0])
                rendered.append(shorter[1])
                truncated += 1
            else:
                faults.append(_too_long(row, ids, max_length, overlong))
    faults.extend(without_labels(rendered, [row.where for row in kept]))
    if not faults and rows and not kept:
        faults.append(
            DataError(
                expected=f"rows of at most {max_length} tokens",
                found=f"none among {len(rows)}; all were dropped",
                fix="raise training.max_length or set data.overlong=truncate",
            )
        )
    raise_faults(faults)
    return Fitted(kept, rendered, truncated, dropped)


def _render(batch: Sequence[Row], renderer: Renderer, faults: list[IftPeftError]) -> list[tuple[Row, Rendered]]:
    """The rows with their ids; those that template or tokenizer refuse go to `faults` by their origin."""
    try:
        return list(zip(batch, renderer.render([row.messages for row in batch]), strict=True))
    except DataError:
        pairs = []
        for row in batch:
            try:
                pairs.append((row, renderer.render([row.messages])[0]))
            except DataError as error:
                faults.append(DataError(expected=error.expected, found=f"{error.found} at {row.where}", fix=error.fix))
        return pairs


def _too_long(row: Row, ids: Rendered, max_length: int, overlong: str) -> DataError:
    if overlong == "error":
        fix = f"raise training.max_length to {len(ids.input_ids)}, or set data.overlong to truncate or drop"
    else:
        fix = "raise training.max_length: the answer and the template alone do not fit"
    return DataError(expected=f"at most {max_length} tokens", found=f"{len(ids.input_ids)} at {row.where}", fix=fix)


def shorten(row: Row, ids: Rendered, renderer: Renderer, *, max_length: int) -> tuple[Row, Rendered] | None:
    """The row, rendered as `ids`, with the end of its longest user text cut until it fits; None where none would."""
    index = max(
        (i for i, message in enumerate(row.messages) if message["role"] == "user"),
        key=lambda i: len(row.messages[i]["content"]),
    )
    content = row.messages[index]["content"]
    text = row.text if row.text is not None and row.text in content else content
    head, _, tail = content.rpartition(text)
    offsets = renderer.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    keep = len(offsets)
    while keep > 0:
        keep -= max(1, len(ids.input_ids) - max_length)
        cut = text[: offsets[keep][0]] if keep > 0 else ""
        if not cut.strip():
            return None
        messages = list(row.messages)
        messages[index] = {"role": "user", "content": head + cut + tail}
        shorter = replace(row, messages=tuple(messages), text=cut if row.text is not None else None)
        (ids,) = renderer.render([shorter.messages])
        if len(ids.input_ids) <= max_length:
            return shorter, ids
    return None
