"""One row: a conversation that ends in the answer to be learnt, and the one way a text becomes its question."""

from __future__ import annotations

from dataclasses import dataclass

Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """A conversation whose last message is the assistant's answer.

    `label` is that answer where the task is classification, `text` the bare text that was asked about, `where` its
    origin, `source` the number of its source among those of the recipe.
    """

    messages: tuple[Message, ...]
    where: str
    label: str | None = None
    text: str | None = None
    source: int = 0

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


def ask(text: str, *, instruction: str | None, system: str | None) -> tuple[Message, ...]:
    """The prompt of one text: the same for training, evaluation and inference."""
    if instruction is None:
        content = text
    elif "{text}" in instruction:
        content = instruction.replace("{text}", text)
    else:
        content = f"{instruction}\n{text}"
    head = ({"role": "system", "content": system},) if system else ()
    return (*head, {"role": "user", "content": content})
