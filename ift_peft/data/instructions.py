"""Several phrasings of one instruction: which row is asked in which words, in which epoch.

Instruction tuning on varied phrasings generalises to unseen ones (FLAN, arXiv:2109.01652; Sanh et al.,
arXiv:2110.08207); whether it does for a given recipe is measured, not assumed: `evaluation.unseen_instructions`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ift_peft.data.row import Message, Row, ask, language_of
from ift_peft.errors import DataError, RecipeError
from ift_peft.sections import Data, Instructions, Pool, flat


def split_pool(section: Instructions) -> tuple[Pool, Pool]:
    """The phrasings to train on, and those held out by `hold_out`: of each language, where the pool has several.

    Raises `RecipeError` where none would be left to train on in some language.
    """
    pools = section.pool if isinstance(section.pool, dict) else {None: section.pool}
    short = [language or "any language" for language, pool in pools.items() if section.hold_out >= len(pool)]
    if short:
        raise RecipeError(
            expected="phrasings left to train on",
            found=f"none for {', '.join(short)} with hold_out={section.hold_out}",
            fix="lower data.instructions.hold_out, or add phrasings",
        )
    trained: dict[Any, tuple[str, ...]] = {}
    kept: dict[Any, tuple[str, ...]] = {}
    for language, pool in pools.items():
        held = set(random.Random(f"{section.seed}:hold out").sample(pool, section.hold_out))
        trained[language] = tuple(phrasing for phrasing in pool if phrasing not in held)
        kept[language] = tuple(phrasing for phrasing in pool if phrasing in held)
    return (trained, kept) if isinstance(section.pool, dict) else (trained[None], kept[None])


def unseen_pool(data: Data, unseen: Pool | None) -> Pool | None:
    """The phrasings to measure as unseen: those of the evaluation section, else those held out of training.

    Raises `RecipeError` where one of them is trained on, and where several places say which they are.
    """
    sections = [asker.section for asker in askers(data) if asker.section is not None]
    trained = {phrasing for section in sections for phrasing in flat(split_pool(section)[0])}
    trained |= {asker.data.instruction for asker in askers(data) if asker.data.instruction is not None}
    held = list(dict.fromkeys(flat(split_pool(section)[1]) for section in sections if section.hold_out))
    if len(held) + (unseen is not None) > 1:
        raise RecipeError(
            expected="unseen phrasings in one place",
            found="hold_out in several instructions" if unseen is None else "hold_out and unseen_instructions",
            fix="hold out of one pool, or set evaluation.unseen_instructions and no hold_out",
        )
    if unseen is None:
        return next((split_pool(section)[1] for section in sections if section.hold_out), None)
    both = sorted(trained & set(flat(unseen)))
    if both:
        raise RecipeError(
            expected="unseen phrasings that are never trained on",
            found=f"{both[0]!r} in both" + (f", and {len(both) - 1} more" if len(both) > 1 else ""),
            fix="remove them from evaluation.unseen_instructions, or from the instructions of data",
        )
    return unseen


def for_text(pool: Pool, text: str) -> tuple[str, ...]:
    """The phrasings that suit the language of `text`. Raises `DataError` for a language without any."""
    if not isinstance(pool, dict):
        return pool
    found = pool.get(language_of(text), ())
    if not found:
        raise DataError(
            expected=f"phrasings for {language_of(text)!r}",
            found=f"only {', '.join(pool)}, and a text {text[:40]!r}",
            fix="add phrasings of that language to the pool (data.instructions, evaluation.unseen_instructions)",
        )
    return found


class Asker:
    """How the rows of one section of data are asked. `pool` is what training draws from; empty for one instruction."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.section = data.instructions
        self.pool: Pool = split_pool(self.section)[0] if self.section is not None else ()

    @property
    def varies_by_epoch(self) -> bool:
        pools = self.pool.values() if isinstance(self.pool, dict) else [self.pool]
        return self.section is not None and self.section.draw == "epoch" and any(len(pool) > 1 for pool in pools)

    def instruction(self, text: str, *, key: str) -> str | None:
        """The phrasing drawn for a text: a function of the section's seed and `key` alone."""
        if self.section is None:
            return self.data.instruction
        return random.Random(f"{self.section.seed}:{key}").choice(for_text(self.pool, text))

    def suits(self, text: str) -> bool:
        """Whether there is a phrasing for the language of `text`."""
        return not isinstance(self.pool, dict) or bool(self.pool.get(language_of(text)))

    def held_out_instruction(self, row: Row) -> str | None:
        """The phrasing that a held-out row is given."""
        return self.instruction(row.text or "", key=f"held out:{row.key}")

    def first_instruction(self, text: str) -> str | None:
        """The phrasing that new texts are asked with: the first that suits their language."""
        return self.data.instruction if self.section is None else for_text(self.pool, text)[0]

    def prompt(self, text: str, instruction: str | None) -> tuple[Message, ...]:
        """The prompt of a new text."""
        position = "before" if self.section is None else self.section.position
        return ask(
            text,
            instruction=instruction,
            system=self.data.system,
            labels=self.data.label_words,
            position=position,
        )

    def asked(self, row: Row, instruction: str | None, *, text: str | None = None) -> Row:
        """`row` asked in other words, or about another text; what precedes its question stays.

        Raises `DataError` for a whole conversation.
        """
        text = row.text if text is None else text
        if text is None:
            raise DataError(
                expected="rows with a text of their own, to ask about it in other words",
                found=f"a whole conversation at {row.where}",
                fix="store text and answer apart (data.columns), or set data.instructions=null and data.augment=null",
            )
        question = self.prompt(text, instruction)[-1]
        return replace(row, messages=(*row.messages[:-2], question, row.messages[-1]), text=text)


def askers(data: Data) -> list[Asker]:
    """The `Asker` of each source, in the order of their numbers in rows; after several, that of `data` itself."""
    parts = [part for part, _ in data.by_source()]
    return [Asker(part) for part in (*parts, *([data] if data.sources else []))]


def asked_first(rows: Sequence[Row], by_source: Sequence[Asker]) -> list[Row]:
    """Training rows as they are asked in the first epoch."""
    return [asked_in(row, by_source[row.source], 0) for row in rows]


def asked_in(row: Row, asker: Asker, variant: int) -> Row:
    """A training row in its phrasing of the epoch `variant`."""
    if asker.section is None:
        return row
    key = f"{variant}:{row.key}" if asker.varies_by_epoch else row.key
    return asker.asked(row, asker.instruction(row.text or "", key=key))


def ask_held_out(rows: Sequence[Row], by_source: Sequence[Asker]) -> list[Row]:
    """Held-out rows, each asked in one of the trained phrasings where there are several."""
    asked = ((row, by_source[row.source]) for row in rows)
    return [row if asker.section is None else asker.asked(row, asker.held_out_instruction(row)) for row, asker in asked]
