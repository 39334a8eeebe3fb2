"""Texts as a classifier with a head of its own reads them: no chat template, and a class in place of an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ift_peft.data.render import IGNORE, Prompt, Rendered, Renderer, TokenRenderer, require_fast
from ift_peft.data.row import Message
from ift_peft.errors import DataError
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
        require_fast(tokenizer)
        self.tokenizer = tokenizer
        self.classes = tuple(classes)
        self.template_hash = hashlib.sha256(json.dumps(["sequence-classification", *classes]).encode()).hexdigest()

    def prompts(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """The ids of each question."""
        texts = [_text(conversation) for conversation in conversations]
        return list(self.tokenizer(texts, verbose=False)["input_ids"]) if texts else []

    def aligned(self, conversations: Sequence[Sequence[Message]]) -> list[Prompt]:
        """`prompts` with their texts, the special tokens around them written out, and where in them each token lies."""
        aligned = []
        for conversation in conversations:
            text = _text(conversation)
            encoded = self.tokenizer(text, verbose=False, return_offsets_mapping=True, return_special_tokens_mask=True)
            ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
            names = self.tokenizer.convert_ids_to_tokens(ids)
            first = special.index(0) if 0 in special else len(ids)
            head = "".join(names[:first])
            whole, offsets = head + text, []
            for index, (start, end) in enumerate(encoded["offset_mapping"]):
                if not special[index]:
                    offsets.append((len(head) + start, len(head) + end))
                elif index < first:
                    offsets.append((len("".join(names[:index])), len("".join(names[: index + 1]))))
                else:
                    offsets.append((len(whole), len(whole) + len(names[index])))
                    whole += names[index]
            aligned.append(Prompt(whole, ids, offsets))
        return aligned

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


def _text(conversation: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in conversation)


def make_renderer(tokenizer: PreTrainedTokenizerBase, *, head: Head, classes: Sequence[str]) -> TokenRenderer:
    """What makes tokens of rows for a base with this `head`."""
    return ClassRenderer(tokenizer, classes) if head == "sequence-classification" else Renderer(tokenizer)
