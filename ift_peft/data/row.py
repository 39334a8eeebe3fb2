"""One row: a conversation that ends in the answer to be learnt, and the one way a text becomes its question."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ift_peft.sections import Language

Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """A conversation whose last message is the assistant's answer.

    `label` is that answer where the task is classification, `text` the bare text that was asked about, `where` its
    origin, `source` the number of its source among those of the recipe, `tests` a program that fails where an answer
    that is code is wrong.
    """

    messages: tuple[Message, ...]
    where: str
    label: str | None = None
    text: str | None = None
    source: int = 0
    tests: str | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def key(self) -> str:
        """The origin without the folders it lies in, so that draws are the same wherever the data is kept."""
        return re.split(r"[/\\]", self.where)[-1]

    @property
    def earlier(self) -> tuple[Message, ...]:
        """The turns before the question, without a system message."""
        return tuple(message for message in self.prompt[:-1] if message["role"] != "system")

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


def ask(
    text: str,
    *,
    instruction: str | None,
    system: str | None,
    labels: Sequence[str] = (),
    position: Literal["before", "after"] = "before",
) -> tuple[Message, ...]:
    """The prompt of one text: the same for training, evaluation and inference.

    `{text}` and `{labels}` in the instruction are filled; an instruction without `{text}` stands `position` it.
    """
    if instruction is None:
        content = text
    else:
        # The text goes in last, so that braces in it are left as they are.
        instruction = instruction.replace("{labels}", list_of(labels, like=instruction))
        if "{text}" in instruction:
            content = text.join(instruction.split("{text}"))
        else:
            content = f"{instruction}\n{text}" if position == "before" else f"{text}\n{instruction}"
    head = ({"role": "system", "content": system},) if system else ()
    return (*head, {"role": "user", "content": content})


def list_of(words: Sequence[str], *, like: str) -> str:
    """`words` as a list in the language of the text `like`, its `{placeholders}` apart."""
    return ("、" if language_of(re.sub(r"\{\w+\}", "", like)) == "zh" else ", ").join(words)


def language_of(text: str) -> Language:
    """`zh` where at least one letter in five is Han, else `en`."""
    letters = sum(character.isalpha() for character in text)
    han = sum("\u3400" <= character <= "\u9fff" for character in text)
    return "zh" if han and han * 5 >= letters else "en"
