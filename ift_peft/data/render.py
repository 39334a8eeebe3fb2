"""Messages to `input_ids` and `labels`: the only code that does it, for training, evaluation, inference and serving.

The loss is on each answer and its end token, and on nothing else: not on role headers, on empty thinking blocks, or on
the line break after the end token, which several published templates mark as the assistant's. Where an answer lies
comes from the chat template's `{% generation %}` markers, from TRL's marked version of a template it knows, or, for
other templates, from rendering the conversation up to that answer; which tokens it has comes from the tokenizer's
character offsets. A prompt for generation is a training row cut where its answer begins.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import has_generation_markers

from ift_peft.data.answer_spans import Span, answer_span, holds_text, special_tokens
from ift_peft.data.row import Message
from ift_peft.data.template import SECONDS, TooSlow, of_one_day, within
from ift_peft.data.template_choice import choose_template
from ift_peft.errors import DataError, ModelError, OutOfMemory, first_line

IGNORE = -100

# transformers keeps one compiled template, with one tracker of where answers lie, for all threads.
_RENDERING = threading.Lock()

_QUESTION: tuple[Message, ...] = ({"role": "user", "content": "1"},)
_PROBE: Message = {"role": "assistant", "content": "1"}


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


class Prompt(NamedTuple):
    """A prompt's text up to where its answer begins, its token ids, and the characters of the text each covers."""

    text: str
    ids: list[int]
    offsets: list[Span]


class TokenRenderer(Protocol):
    """What makes tokens of conversations: `Renderer`, or `ClassRenderer` for a base with a classifier's head."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    origin: str
    template_hash: str

    def prompts(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]: ...

    def aligned(self, conversations: Sequence[Sequence[Message]]) -> list[Prompt]: ...

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[Rendered]: ...

    @property
    def generation_prompt(self) -> str: ...


class Renderer:
    """A tokenizer with the chat template that marks what is learnt.

    `template` is that template, `origin` where it came from, `template_hash` its sha256. Raises `ModelError` for a
    tokenizer without character offsets, or without both a chat template and an end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        require_fast(tokenizer)
        self.tokenizer = tokenizer
        chosen, self.origin = choose_template(tokenizer)
        self.template = of_one_day(chosen)
        self.marked = has_generation_markers(self.template)
        self._specials = special_tokens(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self._walls = tuple(token.content for token in added if token.special and not token.rstrip)
        self.template_hash = hashlib.sha256(self.template.encode()).hexdigest()

    def prompts(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """The ids of each conversation up to where the next answer begins, exactly as they precede it in training."""
        return [prompt.ids for prompt in self.aligned(conversations)]

    def aligned(self, conversations: Sequence[Sequence[Message]]) -> list[Prompt]:
        """`prompts` with their texts, and where in them each token lies."""
        if not conversations:
            return []
        texts, spans = self._spans([(*conversation, _PROBE) for conversation in conversations])
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        aligned = []
        for ids, offsets, answers, text in zip(
            encoded["input_ids"], encoded["offset_mapping"], spans, texts, strict=True
        ):
            length = Rendered(ids, _labels(ids, offsets, answers[-1:], text)).prompt_length
            aligned.append(Prompt(text[: answers[-1][0]], ids[:length], offsets[:length]))
        return aligned

    def render(self, conversations: Sequence[Sequence[Message]]) -> list[Rendered]:
        """Ids and labels of each conversation.

        Raises `DataError` where the template drops or changes an answer or closes it with no special token, where a
        token would be part question, part answer, and where the ids before the first answer are not its prompt's.
        """
        if not conversations:
            return []
        texts, spans = self._spans(conversations)
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        rendered = [
            Rendered(ids, _labels(ids, offsets, answers, text))
            for ids, offsets, answers, text in zip(
                encoded["input_ids"], encoded["offset_mapping"], spans, texts, strict=True
            )
        ]
        starts = [text[: answers[0][0]] if answers else text for text, answers in zip(texts, spans, strict=True)]
        self._check_prompts(conversations, rendered, starts)
        return rendered

    @cached_property
    def end_token_id(self) -> int:
        """The last supervised token of any answer: where generation stops."""
        labels = [label for label in self.render([(*_QUESTION, _PROBE)])[0].labels if label != IGNORE]
        return labels[-1]

    @property
    def generation_prompt(self) -> str:
        """How another server gets our prompts out of the template: `template`, `enable_thinking=false` or `prefix`."""
        (ours,) = self.prompts([_QUESTION])
        for name, options in (("template", {}), ("enable_thinking=false", {"enable_thinking": False})):
            texts, _ = self._render([_QUESTION], add_generation_prompt=True, **options)
            if self.tokenizer(texts[0], add_special_tokens=False)["input_ids"] == ours:
                return name
        return "prefix"

    def _render(self, conversations: Sequence[Sequence[Message]], **options: Any) -> tuple[list[str], list[list[Span]]]:
        try:
            with _RENDERING, within(SECONDS):
                texts, spans = render_jinja_template(
                    conversations=[list(conversation) for conversation in conversations],
                    chat_template=self.template,
                    **{**self.tokenizer.special_tokens_map, **options},
                )
        except TooSlow:
            raise DataError(
                expected=f"a chat template that renders {len(conversations)} conversations in {SECONDS:.0f} s",
                found="one that was still at it",
                fix="correct the chat template in the folder of the base, or use a base that you trust",
            ) from None
        except OutOfMemory:
            raise
        except Exception as error:  # a template is a program, and raises what it likes
            raise DataError(
                expected="a chat template that takes these messages",
                found=first_line(error),
                fix="check roles and their order; templates of vision models do not take plain text",
            ) from error
        return list(texts), [list(map(tuple, marks)) for marks in spans]

    def _spans(self, conversations: Sequence[Sequence[Message]]) -> tuple[list[str], list[list[Span]]]:
        """Each conversation's text, and the characters of each of its answers with their end tokens.

        White space around an answer is taken off first: not every template does it, and it is never part of an answer.
        """
        conversations = [
            [{**m, "content": m["content"].strip()} if m["role"] == "assistant" else m for m in conversation]
            for conversation in conversations
        ]
        answers = [[message["content"] for message in c if message["role"] == "assistant"] for c in conversations]
        if self.marked:
            texts, marks = self._render(conversations, return_assistant_tokens_mask=True)
            marks = [
                [mark for mark in marked if holds_text(text[mark[0] : mark[1]], self._specials)]
                for text, marked in zip(texts, marks, strict=True)
            ]
            if [len(marked) for marked in marks] != [len(contents) for contents in answers]:
                wrong = next(i for i, marked in enumerate(marks) if len(marked) != len(answers[i]))
                raise DataError(
                    expected="one {% generation %} block for each answer",
                    found=f"{len(marks[wrong])} for {len(answers[wrong])} answers in {texts[wrong][:60]!r}",
                    fix="correct the chat template",
                )
        else:
            texts, marks = self._marks_by_prefix(conversations)
        return texts, [
            [
                answer_span(text, start, end, content, specials=self._specials)
                for (start, end), content in zip(marked, contents, strict=True)
            ]
            for text, marked, contents in zip(texts, marks, answers, strict=True)
        ]

    def _marks_by_prefix(self, conversations: Sequence[Sequence[Message]]) -> tuple[list[str], list[list[Span]]]:
        """For a template without markers: an answer lies at the end of the conversation cut after it."""
        texts, _ = self._render(conversations)
        marks: list[list[Span]] = []
        for conversation, text in zip(conversations, texts, strict=True):
            found: list[Span] = []
            for index, message in enumerate(conversation):
                if message["role"] != "assistant":
                    continue
                (until,), _ = self._render([conversation[: index + 1]])
                if not text.startswith(until.rstrip()):
                    same = next(i for i, (a, b) in enumerate(zip(text, f"{until}\0", strict=False)) if a != b)
                    raise DataError(
                        expected="a chat template that renders the beginning of a conversation the same with its end",
                        found=f"{text[same : same + 40]!r} where the beginning alone has {until[same : same + 40]!r}",
                        fix="train on single turns, or mark the answers in the template with {% generation %}",
                    )
                found.append((found[-1][1] if found else 0, len(until.rstrip())))
            marks.append(found)
        return texts, marks

    def _check_prompts(
        self, conversations: Sequence[Sequence[Message]], rendered: Sequence[Rendered], starts: Sequence[str]
    ) -> None:
        """Raise where the ids before a first answer are not its prompt's; `starts` are the texts before it.

        Tokenizers may split what precedes an answer differently for different answers; then no prompt is right. A
        special token is always split off first, so that equal texts that end in one have equal ids.
        """
        asked = [
            (*conversation[: next(i for i, m in enumerate(conversation) if m["role"] == "assistant")], _PROBE)
            for conversation in conversations
        ]
        texts, spans = self._spans(asked)
        doubtful = [
            index
            for index, (start, text, answers) in enumerate(zip(starts, texts, spans, strict=True))
            if start != text[: answers[-1][0]] or not start.endswith(self._walls)
        ]
        prompts = self.prompts([asked[index][:-1] for index in doubtful])
        for prompt, row in zip(prompts, (rendered[index] for index in doubtful), strict=True):
            if row.supervised and row.input_ids[: row.prompt_length] != prompt:
                raise DataError(
                    expected="the tokens before an answer not to depend on the answer",
                    found=f"{self.tokenizer.decode(row.input_ids[: row.prompt_length])!r} before the answer, "
                    f"{self.tokenizer.decode(prompt)!r} before another",
                    fix="let the chat template put a special token before the answer",
                )


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


def require_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ModelError` for a tokenizer that does not tell which characters a token covers."""
    if not tokenizer.is_fast:
        raise ModelError(
            expected="a fast tokenizer (tokenizer.json)",
            found=type(tokenizer).__name__,
            fix="convert it: AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(…)",
        )
