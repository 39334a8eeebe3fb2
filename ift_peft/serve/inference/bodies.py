"""What a client may send for a completion. A parameter that is not done is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ift_peft.serve.errors import UNSUPPORTED, ApiError
from ift_peft.serve.objects import MOST_PAIRS, few_names, few_pairs
from ift_peft.serve.settings import Limits

LEGACY_MAX_TOKENS = 16  # of the legacy form where nothing is said, as OpenAI has it
MOST_MESSAGES = 2048  # of a conversation, parts of a message, prompts of one request: as OpenAI has it


def _none(value: Any) -> None:
    if value is not None:
        raise PydanticCustomError(UNSUPPORTED, "this service does not do it; leave it out")


def _zero(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and value != 0:
        raise PydanticCustomError(UNSUPPORTED, "this service does not do it; leave it out, or send 0")
    return value


def _false(value: Any) -> Any:
    if value is True:
        raise PydanticCustomError(UNSUPPORTED, "this service does not do it; leave it out, or send false")
    return value


def _empty(value: Any) -> Any:
    if isinstance(value, dict) and value:
        raise PydanticCustomError(UNSUPPORTED, "this service does not do it; leave it out")
    return value


def _text_only(value: Any) -> Any:
    """A part of a message, `response_format`, `modalities`: of what is known to OpenAI, text alone is done."""
    kinds = [value.get("type")] if isinstance(value, dict) else value[:MOST_MESSAGES] if isinstance(value, list) else []
    other = [kind for kind in kinds if isinstance(kind, str) and kind != "text"]
    if other:
        raise PydanticCustomError(UNSUPPORTED, "this service does text only")
    return value


def _usual(value: Any) -> Any:
    if isinstance(value, str) and value not in ("auto", "default"):
        raise PydanticCustomError(UNSUPPORTED, "this service has one tier; leave it out")
    return value


def _no_role(value: Any) -> Any:
    if value in ("tool", "function"):
        raise PydanticCustomError(UNSUPPORTED, "this service calls no tools")
    return value


def _whole(text: str) -> str:
    """JSON can say half a character (`\\ud800`), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "Input should be whole Unicode characters") from None
    return text


# Every list ends at its first fault: one for each of a million elements would hold the event loop for minutes.
ONE_OR_MORE: Any = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
Unsupported = Annotated[None, BeforeValidator(_none)]
Penalty = Annotated[Annotated[float, Field(ge=0, le=0)] | None, BeforeValidator(_zero)]
Switch = Annotated[Literal[False] | None, BeforeValidator(_false)]
Count = Annotated[int, Field(ge=1)]
Line = Annotated[str, AfterValidator(_whole)]
Text = Annotated[Line, Field(min_length=1)]
Pairs = Annotated[dict[Line, Line], Field(max_length=MOST_PAIRS)]
Stop = Annotated[Text, Field(max_length=1024)]


class Body(BaseModel):
    """Strict: a number in quotes is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _of_few_names(cls, value: Any) -> Any:
        return few_names(value)


class TextPart(Body):
    type: Literal["text"]
    text: Line


class Message(Body):
    """Fields that answers have and that are null there may come back as null."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_no_role)]
    content: Line | Annotated[list[Annotated[TextPart, BeforeValidator(_text_only)]], ONE_OR_MORE]
    name: Unsupported = None
    refusal: Unsupported = None
    annotations: Annotated[list[Any] | None, Field(max_length=0)] = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Unsupported = None
    tool_call_id: Unsupported = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it. What `developer` says is what `system` used to."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Switch = None


class ResponseFormat(Body):
    type: Literal["text"]


class Sampling(Body):
    """What both forms share."""

    model: Annotated[Text, Field(max_length=256)]
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Line | None = None
    frequency_penalty: Penalty = None
    presence_penalty: Penalty = None
    logit_bias: Annotated[Annotated[dict[str, int], Field(max_length=0)] | None, BeforeValidator(_empty)] = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true only")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def tells_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self, limits: Limits) -> None:
        """Raise `ApiError` for more than the service gives."""
        if self.choices > limits.choices:
            raise ApiError(400, f"n is at most {limits.choices}.", code="invalid_value", param="n")
        _at_most(self.max_tokens, limits, "max_tokens")


class ChatBody(Sampling):
    """Of POST /v1/chat/completions."""

    messages: Annotated[list[Message], ONE_OR_MORE]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Annotated[ResponseFormat | None, BeforeValidator(_text_only)] = None
    modalities: Annotated[Annotated[list[Literal["text"]], ONE_OR_MORE] | None, BeforeValidator(_text_only)] = None
    service_tier: Annotated[Literal["auto", "default"] | None, BeforeValidator(_usual)] = None
    store: Switch = None
    metadata: Annotated[Pairs | None, BeforeValidator(few_pairs)] = None
    safety_identifier: Line | None = None
    prompt_cache_key: Line | None = None
    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    moderation: Unsupported = None
    parallel_tool_calls: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Unsupported = None
    tool_choice: Unsupported = None
    tools: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens is the old name of max_completion_tokens; send one of them")
        return self

    @property
    def likeliest(self) -> int | None:
        """How many tokens are told beside each; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def most(self, limits: Limits) -> int:
        """New tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens or limits.max_completion_tokens

    def check(self, limits: Limits) -> None:
        super().check(limits)
        _at_most(self.max_completion_tokens, limits, "max_completion_tokens")


Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]


class CompletionBody(Sampling):
    """Of POST /v1/completions."""

    prompt: Text | Annotated[list[Text], ONE_OR_MORE] | Tokens | Annotated[list[Tokens], ONE_OR_MORE]
    best_of: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    suffix: Unsupported = None

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each of one or several."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        ids = [one for one in given if isinstance(one, int)]
        return [ids] if ids else [one for one in given if not isinstance(one, int)]

    def most(self, limits: Limits) -> int:
        return self.max_tokens or min(LEGACY_MAX_TOKENS, limits.max_completion_tokens)

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.best_of is not None and self.best_of != self.choices:
            raise _unsupported("best_of is done only where it is n", "best_of")
        if self.echo and self.logprobs is not None:
            raise _unsupported("log-probabilities of a prompt are not done: leave out echo or logprobs", "logprobs")
        if len(self.prompts) * self.choices > limits.waiting_requests:
            message = f"Together these prompts ask for more than {limits.waiting_requests} answers; send fewer at once."
            raise ApiError(400, message, code="invalid_value", param="prompt")


def _unsupported(message: str, param: str) -> ApiError:
    return ApiError(400, f"{message}.", code=UNSUPPORTED, param=param)


def _at_most(value: int | None, limits: Limits, param: str) -> None:
    if value is not None and value > limits.max_completion_tokens:
        message = f"{param} is too large: {value}. This service gives at most {limits.max_completion_tokens}."
        raise ApiError(400, message, code="invalid_value", param=param)
