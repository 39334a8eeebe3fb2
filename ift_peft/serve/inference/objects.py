"""The objects of completions, field by field as OpenAI's reference has them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ift_peft.serve.objects import Object

Finish = Literal["stop", "length"]


class TopLogprob(Object):
    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Object):
    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(Object):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    annotations: list[str] = Field(default_factory=list)


class ChatChoice(Object):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class Usage(Object):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(Object):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: Literal["default"] = "default"
    system_fingerprint: str


class LegacyLogprobs(Object):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Object):
    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Finish


class Completion(Object):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str
