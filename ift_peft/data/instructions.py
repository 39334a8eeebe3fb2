"""Several phrasings of one instruction: which row is asked in which words, in which epoch.

Instruction tuning on varied phrasings generalises to unseen ones (FLAN, arXiv:2109.01652; Sanh et al.,
arXiv:2110.08207); whether it does for a given recipe is measured, not assumed: `evaluation.unseen_instructions`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from ift_peft.data.row import Message, Row, ask, language_of
from ift_peft.errors import DataError, RecipeError
from ift_peft.sections import Data, Instructions, Pool


def flat(pool: Pool) -> tuple[str, ...]:
    """Every phrasing of a pool, each once."""
    if isinstance(pool, dict):
        return tuple(dict.fromkeys(phrasing for phrasings in pool.values() for phrasing in phrasings))
    return pool


def split_pool(section: Instructions) -> tuple[Pool, Pool]:
    """The phrasings to train on, and those held out by `hold_out`.

    Raises `RecipeError` where none would be left to train on in some language.
    """
    phrasings = flat(section.pool)
    rng = random.Random(f"{section.seed}:hold out")
    held = set(rng.sample(phrasings, min(section.hold_out, len(phrasings))))

    def part(pool: tuple[str, ...], *, unseen: bool) -> tuple[str, ...]:
        return tuple(phrasing for phrasing in pool if (phrasing in held) == unseen)

    if isinstance(section.pool, dict):
        empty = [str(language) for language, pool in section.pool.items() if not part(pool, unseen=False)]
        trained: Pool = {language: part(pool, unseen=False) for language, pool in section.pool.items()}
        kept: Pool = {language: part(pool, unseen=True) for language, pool in section.pool.items()}
    else:
        trained, kept = part(section.pool, unseen=False), part(section.pool, unseen=True)
        empty = [] if trained else ["any language"]
    if empty:
        raise RecipeError(
            expected="phrasings left to train on",
            found=f"none for {', '.join(empty)} with hold_out={section.hold_out} of {len(phrasings)}",
            fix="lower data.instructions.hold_out, or add phrasings",
        )
    return trained, kept


def unseen_pool(data: Data, unseen: Pool | None) -> Pool | None:
    """The phrasings to measure as unseen: those of the evaluation section, else those held out of training.

    Raises `RecipeError` where one of them is trained on.
    """
    sections = [part.instructions for part, _ in data.by_source() if part.instructions is not None]
    trained = {phrasing for section in sections for phrasing in flat(split_pool(section)[0])}
    trained |= {part.instruction for part, _ in data.by_source() if part.instruction is not None}
    if unseen is None:
        held = [split_pool(section)[1] for section in sections if section.hold_out]
        return held[0] if held else None
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
            fix="add phrasings of that language to data.instructions.pool",
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
        return self.section is not None and self.section.draw == "epoch" and len(flat(self.pool)) > 1

    def instruction(self, text: str, *, key: str) -> str | None:
        """The phrasing drawn for a text: a function of the section's seed and `key` alone."""
        if self.section is None:
            return self.data.instruction
        return random.Random(f"{self.section.seed}:{key}").choice(for_text(self.pool, text))

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
    """The `Asker` of each source, in the order of their numbers in rows."""
    return [Asker(part) for part, _ in data.by_source()]


def ask_held_out(rows: Sequence[Row], by_source: Sequence[Asker]) -> list[Row]:
    """Held-out rows, each asked in one of the trained phrasings where there are several."""
    return [
        row
        if by_source[row.source].section is None
        else by_source[row.source].asked(
            row, by_source[row.source].instruction(row.text or "", key=f"held out:{row.key}")
        )
        for row in rows
    ]
