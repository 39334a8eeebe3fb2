"""Rows that must fit `max_length`: their text is shortened, never their answer, and never in silence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

from ift_peft.data.render import Rendered, TokenRenderer
from ift_peft.data.row import Row
from ift_peft.data.rows import SHOWN_FAULTS, raise_faults
from ift_peft.errors import DataError, IftPeftError

BATCH = 1000
Overlong = Literal["truncate", "drop", "error"]


@dataclass
class Fit:
    """What happened to the rows that were made to fit."""

    truncated: int = 0
    dropped: int = 0
    faults: list[IftPeftError] = field(default_factory=list)
    faulty: int = 0

    def fault(self, error: IftPeftError) -> None:
        """Keep the first faults, and the number of all: a large set may have as many faults as rows."""
        self.faulty += 1
        if len(self.faults) <= SHOWN_FAULTS:
            self.faults.append(error)

    def notes(self, what: str, max_length: int | None) -> list[str]:
        """What happened to those of `what` that were too long, in words."""
        notes = []
        if self.truncated:
            notes.append(f"{self.truncated} {what} over {max_length} tokens: the end of their text was cut")
        if self.dropped:
            notes.append(f"{self.dropped} {what} over {max_length} tokens were left out (data.overlong=drop)")
        return notes


@dataclass(frozen=True)
class Fitted:
    """Rows with their rendering, and how many had to be shortened or left out to fit."""

    rows: list[Row]
    rendered: list[Rendered]
    fit: Fit

    @property
    def tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rendered)

    @property
    def supervised_tokens(self) -> int:
        return sum(row.supervised for row in self.rendered)


def fit_rows(
    rows: Sequence[Row],
    renderer: TokenRenderer,
    *,
    max_length: int | None,
    overlong: Overlong,
) -> Fitted:
    """Render `rows` so that each has at most `max_length` tokens (None: any number).

    Raises `Faults` naming every row that cannot fit, and every row left without a supervised token.
    """
    fit = Fit()
    pairs = [
        pair
        for batch in fit_batches(rows, renderer, fit, max_length=max_length, overlong=overlong)
        for pair in batch
        if pair is not None
    ]
    raise_unfit(fit, rows=len(rows), kept=len(pairs), max_length=max_length)
    return Fitted([row for row, _ in pairs], [rendered for _, rendered in pairs], fit)


def raise_unfit(fit: Fit, *, rows: int, kept: int, max_length: int | None) -> None:
    """Raise the faults found while fitting, and one where every row was dropped."""
    if not fit.faults and rows and not kept:
        fit.fault(
            DataError(
                expected=f"rows of at most {max_length} tokens",
                found=f"none among {rows}; all were dropped",
                fix="raise training.max_length or set data.overlong=truncate",
            )
        )
    raise_faults(fit.faults, count=fit.faulty)


def fit_batches(
    rows: Iterable[Row], renderer: TokenRenderer, fit: Fit, *, max_length: int | None, overlong: Overlong
) -> Iterator[list[tuple[Row, Rendered] | None]]:
    """The rows with their rendering, batch by batch; None for a row that was left out or is at fault."""
    remaining = iter(rows)
    while batch := list(islice(remaining, BATCH)):
        yield [
            None if pair is None else _fitted(*pair, renderer, fit, max_length=max_length, overlong=overlong)
            for pair in _render(batch, renderer, fit)
        ]


def _fitted(
    row: Row, ids: Rendered, renderer: TokenRenderer, fit: Fit, *, max_length: int | None, overlong: Overlong
) -> tuple[Row, Rendered] | None:
    if max_length is not None and len(ids.input_ids) > max_length:
        if overlong == "drop":
            fit.dropped += 1
            return None
        shorter = shorten(row, ids, renderer, max_length=max_length) if overlong == "truncate" else None
        if shorter is None:
            fit.fault(_too_long(row, ids, max_length, overlong))
            return None
        fit.truncated += 1
        row, ids = shorter
    if ids.supervised == 0:
        fit.fault(_without_labels(row.where))
        return None
    return row, ids


def _render(batch: Sequence[Row], renderer: TokenRenderer, fit: Fit) -> list[tuple[Row, Rendered] | None]:
    """The rows with their ids; None for those that template or tokenizer refuse, whose faults name their origin."""
    try:
        return list(zip(batch, renderer.render([row.messages for row in batch]), strict=True))
    except DataError:
        pairs: list[tuple[Row, Rendered] | None] = []
        for row in batch:
            try:
                pairs.append((row, renderer.render([row.messages])[0]))
            except DataError as error:
                fit.fault(DataError(expected=error.expected, found=f"{error.found} at {row.where}", fix=error.fix))
                pairs.append(None)
        return pairs


def _too_long(row: Row, ids: Rendered, max_length: int, overlong: str) -> DataError:
    if overlong == "error":
        fix = f"raise training.max_length to {len(ids.input_ids)}, or set data.overlong to truncate or drop"
    else:
        fix = "raise training.max_length: the answer and the template alone do not fit"
    return DataError(expected=f"at most {max_length} tokens", found=f"{len(ids.input_ids)} at {row.where}", fix=fix)


def shorten(row: Row, ids: Rendered, renderer: TokenRenderer, *, max_length: int) -> tuple[Row, Rendered] | None:
    """The row, rendered as `ids`, with the end of its text, or of its longest question, cut until it fits; None where
    none would.
    """
    asked = [i for i, message in enumerate(row.messages) if message["role"] == "user"]
    index = asked[-1] if row.text is not None else max(asked, key=lambda i: len(row.messages[i]["content"]))
    content = row.messages[index]["content"]
    text = row.text if row.text is not None and row.text in content else content
    head, _, tail = content.rpartition(text)
    offsets = renderer.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
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


def _without_labels(where: str) -> DataError:
    """The fault of a row in which nothing would be learnt."""
    return DataError(
        expected="at least one supervised token",
        found=f"none at {where}",
        fix="check the answer, the chat template and training.max_length",
    )
