"""Texts as a classifier with a head of its own reads them: no chat template, and a class in place of an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ift_peft.data.render import IGNORE, Rendered, Renderer, TokenRenderer
from ift_peft.data.row import Message
from ift_peft.errors import DataError, ModelError
from ift_peft.sections import Head


class ClassRenderer:
    """A tokenizer with the classes of a task, in order.

    A question is the text of its messages, a line each, with the special tokens that the tokenizer itself puts around
    a text. The last of its `labels` is the number of the class, the others are IGNORE. Raises `ModelError` for a
    tokenizer without character offsets.
    """

    template = ""
    origin = "none: a classifier reads the text alone"
    generation_prompt = "none"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, classes: Sequence[str]) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                expected="a fast tokenizer (tokenizer.json)",
                found=type(tokenizer).__name__,
                fix="convert it: AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(…)",
            )
        self.tokenizer = tokenizer
        self.classes = tuple(classes)
        self.template_hash = hashlib.sha256(json.dumps(["sequence-classification", *classes]).encode()).hexdigest()

    def prompts(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """The ids of each question."""
        texts = ["\n".join(message["content"] for message in conversation) for conversation in conversations]
        return list(self.tokenizer(texts, verbose=False)["input_ids"]) if texts else []

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[Rendered]:
        """Ids and class of each row, whose last message is its class. Raises `DataError` for another answer."""
        rendered = []
        for ids, conversation in zip(
            self.prompts([conversation[:-1] for conversation in conversations]), conversations, strict=True
        ):
            answer = conversation[-1]["content"].strip()
            if answer not in self.classes or not ids:
                raise DataError(
                    expected=f"a text, and one of the classes {', '.join(self.classes)}",
                    found=repr(answer) if ids else "a text without tokens",
                    fix="correct the row, or data.labels",
                )
            rendered.append(Rendered(ids, [IGNORE] * (len(ids) - 1) + [self.classes.index(answer)]))
        return rendered


def make_renderer(tokenizer: PreTrainedTokenizerBase, *, head: Head, classes: Sequence[str]) -> TokenRenderer:
    """What makes tokens of rows for a base with this `head`."""
    return ClassRenderer(tokenizer, classes) if head == "sequence-classification" else Renderer(tokenizer)
