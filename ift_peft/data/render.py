"""Messages to `input_ids` and `labels`: the only code that does it, for training, evaluation, inference and serving.

The loss is on each answer and its end token, and on nothing else. Which characters those are comes from the chat
template's `{% generation %}` markers, from TRL's marked version of a template it knows, or, for other templates, from
rendering the conversation up to each answer; which tokens they are comes from the tokenizer's character offsets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from ift_peft.data.rows import Message
from ift_peft.errors import DataError, IftPeftError, ModelError

IGNORE = -100

# For tokenizers that come without a template. The answer's leading space belongs to the answer, so that tokenizers
# which join a space to the word after it split the same way with and without the answer.
FALLBACK_TEMPLATE = (
    "{%- if bos_token is defined and bos_token -%}{{ bos_token }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- 'Assistant:' -}}{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}"
    "{{- '\\n' -}}"
    "{%- elif message['role'] == 'system' -%}"
    "{{- message['content'] + '\\n' -}}"
    "{%- else -%}"
    "{{- 'User: ' + message['content'] + '\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """One conversation as token ids; `labels` is as long as `input_ids` and IGNORE wherever there is no loss."""

    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first supervised one."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORE), len(self.labels))


class Renderer:
    """A tokenizer with the chat template that marks what is learnt.

    `template` is that template, `origin` where it came from, `template_hash` its sha256. Raises `ModelError` for a
    tokenizer without character offsets, or without both a chat template and an end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                expected="a fast tokenizer (tokenizer.json)",
                found=type(tokenizer).__name__,
                fix="convert it: AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(…)",
            )
        self.tokenizer = tokenizer
        self.template, self.origin = _choose_template(tokenizer)
        self.marked = has_generation_markers(self.template)
        self.template_hash = hashlib.sha256(self.template.encode()).hexdigest()

    def text(self, conversations: Sequence[Sequence[Message]], *, for_generation: bool) -> list[str]:
        """The rendered text of each conversation, ending where an answer would begin if `for_generation`."""
        texts, _ = self._render(conversations, for_generation=for_generation, with_spans=False)
        return texts

    def prompts(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """The ids of each conversation up to where its next answer begins."""
        if not conversations:
            return []
        texts = self.text(conversations, for_generation=True)
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[Rendered]:
        """Ids and labels of each conversation.

        Raises `DataError` where a token would be part question, part answer, and where the ids before the first answer
        are not those that generation would start from.
        """
        if not conversations:
            return []
        if self.marked:
            texts, spans = self._render(conversations, for_generation=False, with_spans=True)
        else:
            texts, spans = self._spans_by_prefix(conversations)
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        rendered = [
            Rendered(ids, _labels(ids, offsets, answer_spans, text))
            for ids, offsets, answer_spans, text in zip(
                encoded["input_ids"], encoded["offset_mapping"], spans, texts, strict=True
            )
        ]
        self._check_prompts(conversations, rendered)
        return rendered

    @property
    def end_token_id(self) -> int:
        """The last supervised token of any answer: where generation stops."""
        question = ({"role": "user", "content": "1"}, {"role": "assistant", "content": "1"})
        labels = [label for label in self.render([question])[0].labels if label != IGNORE]
        return labels[-1]

    def _render(
        self, conversations: Sequence[Sequence[Message]], *, for_generation: bool, with_spans: bool
    ) -> tuple[list[str], list[list[Span]]]:
        arguments: dict[str, Any] = {
            "conversations": [list(conversation) for conversation in conversations],
            "chat_template": self.template,
            "add_generation_prompt": for_generation,
            "return_assistant_tokens_mask": with_spans,
            **self.tokenizer.special_tokens_map,
        }
        texts, spans = render_jinja_template(**arguments)
        return list(texts), [list(map(tuple, marks)) for marks in spans]

    def _spans_by_prefix(self, conversations: Sequence[Sequence[Message]]) -> tuple[list[str], list[list[Span]]]:
        """For a template without markers: an answer runs from its generation prompt to its first special token."""
        texts = self.text(conversations, for_generation=False)
        specials = [token for token in self.tokenizer.all_special_tokens if token]
        spans: list[list[Span]] = []
        for conversation, text in zip(conversations, texts, strict=True):
            found: list[Span] = []
            for index, message in enumerate(conversation):
                if message["role"] != "assistant":
                    continue
                (before,) = self.text([conversation[:index]], for_generation=True)
                start = len(before)
                content = text.find(message["content"].strip(), start)
                after = content + len(message["content"].strip())
                ends = [(text.find(token, after), len(token)) for token in specials if text.find(token, after) >= 0]
                if not text.startswith(before) or content < 0 or not ends:
                    raise DataError(
                        expected="a chat template that renders the beginning of a conversation the same with and "
                        "without its end, and closes answers with a special token",
                        found=f"text that changes, or no such token, at {text[max(0, start - 30) : start + 30]!r}",
                        fix="mark the answers in the template with {% generation %} … {% endgeneration %}",
                    )
                position, length = min(ends)
                found.append((start, position + length))
            spans.append(found)
        return texts, spans

    def _check_prompts(self, conversations: Sequence[Sequence[Message]], rendered: Sequence[Rendered]) -> None:
        firsts = [
            next((i for i, message in enumerate(conversation) if message["role"] == "assistant"), len(conversation))
            for conversation in conversations
        ]
        prompts = self.prompts(
            [conversation[:first] for conversation, first in zip(conversations, firsts, strict=True)]
        )
        for prompt, row in zip(prompts, rendered, strict=True):
            if row.supervised and row.input_ids[: row.prompt_length] != prompt:
                raise DataError(
                    expected="the tokens before an answer to be those that generation starts from",
                    found=f"{self.tokenizer.decode(row.input_ids[: row.prompt_length])!r} in training, "
                    f"{self.tokenizer.decode(prompt)!r} in generation",
                    fix="put everything that precedes the answer into the template's generation prompt",
                )


def _choose_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()))
    if not template:
        if tokenizer.eos_token is None:
            raise ModelError(
                expected="a chat template or an end-of-sequence token",
                found="a tokenizer with neither",
                fix="set eos_token in tokenizer_config.json",
            )
        return FALLBACK_TEMPLATE, "fallback (the tokenizer has no chat template)"
    if has_generation_markers(template):
        return str(template), "the tokenizer's, with generation markers"
    try:
        known = get_training_chat_template(tokenizer)
    except ValueError:  # TRL knows no marked version of it
        known = None
    if known is not None:
        return known, "TRL's marked version of the tokenizer's"
    return str(template), "the tokenizer's, without generation markers"


def _labels(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span], text: str) -> list[int]:
    """The ids inside `spans`, IGNORE elsewhere; `offsets` are the characters that each token covers."""
    labels = [IGNORE] * len(ids)
    remaining = iter(spans)
    span = next(remaining, None)
    for index, (start, end) in enumerate(offsets):
        while span is not None and start >= span[1] and (end > start or start > span[1]):
            span = next(remaining, None)
        if span is None:
            break
        if start >= span[0] and end <= span[1]:
            labels[index] = ids[index]
        elif end > span[0] and start < span[1]:
            raise DataError(
                expected="no token to be part question, part answer",
                found=f"a token covering {text[start:end]!r} across the edge of the answer {text[span[0] : span[1]]!r}",
                fix="let the chat template put a special token before the answer",
            )
    return labels


def without_labels(rendered: Sequence[Rendered], origins: Sequence[str]) -> list[IftPeftError]:
    """A fault for every row in which nothing would be learnt."""
    return [
        DataError(
            expected="at least one supervised token",
            found=f"none at {where}",
            fix="check the answer, the chat template and training.max_length",
        )
        for row, where in zip(rendered, origins, strict=True)
        if row.supervised == 0
    ]
