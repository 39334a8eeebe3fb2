"""Answers in the two forms that clients read: chat completions and the older text completions, whole and streamed."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from ift_peft.serve.errors import ApiError, body_of
from ift_peft.serve.ids import new_id
from ift_peft.serve.inference.answer import Answer
from ift_peft.serve.inference.objects import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    Finish,
    LegacyLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)

if TYPE_CHECKING:
    from ift_peft.infer import request as engine
    from ift_peft.infer.sampling import TokenLogprob as EngineLogprob
    from ift_peft.serve.inference.hosts import Model
    from ift_peft.serve.inference.tokens import TokensOfText

log = logging.getLogger("ift_peft.serve")
LEAST = -9999.0  # for minus infinity, which JSON has not


class Form:
    """What both have: one request's id, time, model and prompts, and whether log-probabilities are told."""

    prefix: str
    chunk_kind: str

    def __init__(self, model: Model, name: str, answer: Answer, *, choices: int) -> None:
        self.model, self.name, self.choices = model, name, choices
        self.id, self.created = new_id(self.prefix), int(time.time())
        self.prompts = [request.prompt for request in answer.requests[::choices]]
        self.tells_logprobs = answer.requests[0].logprobs is not None
        self._tokens: dict[int, TokensOfText] | None = {} if answer.requests[0].stop else None

    def usage(self, completions: Sequence[engine.Completion]) -> Usage:
        asked = sum(map(len, self.prompts))
        answered = sum(one.completion_tokens for one in completions)
        return Usage(prompt_tokens=asked, completion_tokens=answered, total_tokens=asked + answered)

    def told(self, number: int, piece: engine.Piece | engine.Completion) -> Sequence[EngineLogprob]:
        """The tokens whose log-probabilities are told with a piece, or with a whole answer."""
        if self._tokens is None or not self.tells_logprobs:
            return piece.logprobs
        if number not in self._tokens:
            from ift_peft.serve.inference.tokens import TokensOfText  # it imports torch

            self._tokens[number] = TokensOfText(self.model.host.names)
        return self._tokens[number].take(piece.text, piece.logprobs)

    def rest(self, number: int, completion: engine.Completion) -> Sequence[EngineLogprob]:
        """Those that are told at the answer's end."""
        if self._tokens is None or number not in self._tokens:
            return ()
        by_string = completion.finish_reason == "stop" and completion.tokens[-1] not in self.model.host.names.ends
        return self._tokens[number].rest(stopped=by_string)

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._head(), "object": self.chunk_kind, "choices": choices, **more}

    def _head(self) -> dict[str, Any]:
        """What a whole answer and each of its chunks say of themselves alike."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.name,
            "system_fingerprint": self.model.system_fingerprint,
        }

    def begun(self, number: int) -> dict[str, Any] | None:
        """The chunk before an answer's first text, if any."""
        raise NotImplementedError

    def part(self, number: int, piece: engine.Piece) -> dict[str, Any] | None:
        """The chunk of a piece, if it has anything to tell."""
        raise NotImplementedError

    def ended(self, number: int, completion: engine.Completion) -> dict[str, Any]:
        raise NotImplementedError


class ChatForm(Form):
    prefix, chunk_kind = "chatcmpl", "chat.completion.chunk"

    def __init__(self, model: Model, name: str, answer: Answer, *, choices: int) -> None:
        super().__init__(model, name, answer, choices=choices)
        self._begun: set[int] = set()  # answers of which some text is out

    def whole(self, completions: Sequence[engine.Completion]) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=number,
                message=AnswerMessage(content=self._text(number, one.text)),
                logprobs=self._logprobs([*self.told(number, one), *self.rest(number, one)]),
                finish_reason=_finish(one),
            )
            for number, one in enumerate(completions)
        ]
        return ChatCompletion(choices=choices, usage=self.usage(completions), **self._head())

    def begun(self, number: int) -> dict[str, Any]:
        return _choice(number, {"role": "assistant", "content": "", "refusal": None})

    def part(self, number: int, piece: engine.Piece) -> dict[str, Any] | None:
        logprobs = self._logprobs(self.told(number, piece))
        text = self._text(number, piece.text)
        if not text and (logprobs is None or not logprobs.content):
            return None
        return _choice(number, {"content": text}, logprobs=logprobs and logprobs.model_dump())

    def ended(self, number: int, completion: engine.Completion) -> dict[str, Any]:
        rest = self._logprobs(self.rest(number, completion))
        logprobs = rest.model_dump() if rest and rest.content else None
        return _choice(number, {}, logprobs=logprobs, finish_reason=_finish(completion))

    def _text(self, number: int, text: str) -> str:
        """Without the one space that stands before an answer under some templates."""
        if text and number not in self._begun:
            self._begun.add(number)
            return text.removeprefix(" ") if self.model.host.begins_with_space else text
        return text

    def _logprobs(self, given: Sequence[EngineLogprob]) -> ChatLogprobs | None:
        if not self.tells_logprobs:
            return None
        names = self.model.host.names
        content = []
        for one in given:
            if one.token in names.ends:  # no part of the text
                continue
            top = [_top(names.of(token), logprob) for token, logprob in one.top]
            text, raw = names.of(one.token)
            content.append(TokenLogprob(token=text, bytes=raw, logprob=_finite(one.logprob), top_logprobs=top))
        return ChatLogprobs(content=content)


class TextForm(Form):
    prefix, chunk_kind = "cmpl", "text_completion"

    def __init__(self, model: Model, name: str, answer: Answer, *, choices: int, echoes: Sequence[str] | None) -> None:
        """`echoes` are the prompts' texts, where answers are to begin with them."""
        super().__init__(model, name, answer, choices=choices)
        self._echoes = echoes
        self._written: dict[int, bytearray] = {}  # of each answer's tokens so far

    def whole(self, completions: Sequence[engine.Completion]) -> Completion:
        choices = [
            CompletionChoice(
                index=number,
                text=self._echo(number) + one.text,
                logprobs=self._logprobs(number, [*self.told(number, one), *self.rest(number, one)]),
                finish_reason=_finish(one),
            )
            for number, one in enumerate(completions)
        ]
        return Completion(choices=choices, usage=self.usage(completions), **self._head())

    def begun(self, number: int) -> dict[str, Any] | None:
        return self._part(number, self._echo(number), None) if self._echoes else None

    def part(self, number: int, piece: engine.Piece) -> dict[str, Any] | None:
        logprobs = self._logprobs(number, self.told(number, piece))
        if not piece.text and (logprobs is None or not logprobs.tokens):
            return None
        return self._part(number, piece.text, logprobs)

    def ended(self, number: int, completion: engine.Completion) -> dict[str, Any]:
        rest = self._logprobs(number, self.rest(number, completion))
        logprobs = rest.model_dump() if rest and rest.tokens else None
        return {"index": number, "text": "", "logprobs": logprobs, "finish_reason": _finish(completion)}

    def _part(self, number: int, text: str, logprobs: LegacyLogprobs | None) -> dict[str, Any]:
        dumped = logprobs and logprobs.model_dump()
        return {"index": number, "text": text, "logprobs": dumped, "finish_reason": None}

    def _echo(self, number: int) -> str:
        return self._echoes[number // self.choices] if self._echoes else ""

    def _logprobs(self, number: int, given: Sequence[EngineLogprob]) -> LegacyLogprobs | None:
        if not self.tells_logprobs:
            return None
        names, written = self.model.host.names, self._written.setdefault(number, bytearray())
        told = LegacyLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for one in given:
            if one.token in names.ends:
                continue
            text, raw = names.of(one.token)
            told.tokens.append(text)
            told.token_logprobs.append(_finite(one.logprob))
            told.top_logprobs.append(
                {names.of(token)[0]: _finite(logprob) for token, logprob in [*one.top, (one.token, one.logprob)]}
            )
            told.text_offset.append(len(written.decode("utf-8", errors="ignore")))
            written += bytes(raw)
        return told


async def events(form: Form, answer: Answer, *, tells_usage: bool) -> AsyncIterator[str]:
    """The stream of an answer as server-sent events; what goes wrong is its last one."""
    from ift_peft.infer.request import Piece

    more: dict[str, Any] = {"usage": None} if tells_usage else {}
    try:
        for number in range(len(answer.streams)):
            first = form.begun(number)
            if first is not None:
                yield _event(form.chunk([first], **more))
        completions = []
        async for number, what in answer.pieces():
            if not isinstance(what, Piece):
                completions.append(what)
                yield _event(form.chunk([form.ended(number, what)], **more))
                continue
            part = form.part(number, what)
            if part is not None:
                yield _event(form.chunk([part], **more))
        if tells_usage:
            yield _event(form.chunk([], usage=form.usage(completions).model_dump()))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(body_of(error.status, error.message, code=error.code, param=error.param))
    except Exception as error:
        log.error("stream failed", exc_info=error)
        yield _event(body_of(500, "The server had an error; its log says which.", code="internal_error"))
    finally:
        answer.close()


def _event(content: dict[str, Any]) -> str:
    """In ASCII: some clients take other line separators of Unicode for the end of a line."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


def _choice(
    number: int, delta: dict[str, Any], *, logprobs: Any = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _finish(completion: engine.Completion) -> Finish:
    return "length" if completion.finish_reason == "length" else "stop"


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)


def _top(named: tuple[str, list[int]], logprob: float) -> TopLogprob:
    return TopLogprob(token=named[0], bytes=named[1], logprob=_finite(logprob))
