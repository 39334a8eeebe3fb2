"""Chat and text completions, whole and streamed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from ift_peft.serve.inference.answer import Answer, ClientGone, EventStream, unless_gone
from ift_peft.serve.inference.bodies import ChatBody, CompletionBody, Sampling
from ift_peft.serve.inference.forms import ChatForm, TextForm, events
from ift_peft.serve.inference.objects import ChatCompletion, Completion
from ift_peft.serve.objects import ErrorBody
from ift_peft.serve.service import Service, Serving

if TYPE_CHECKING:
    from ift_peft.infer import request as engine
    from ift_peft.serve.inference.hosts import Model

router = APIRouter(tags=["chat"])
STREAM = "text/event-stream"
STATUSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {STREAM: {}}, "description": "Whole, or streamed as events"},
    **{
        status: {"model": ErrorBody, "description": what}
        for status, what in {
            400: "A request that cannot be answered",
            404: "No such model",
            429: "No room now; Retry-After says when to come back",
            503: "A model that cannot be loaded now",
            504: "Not answered in time",
        }.items()
    },
}
GONE = 499  # for who reads logs: the client is not there to read it


@router.post("/chat/completions", response_model=ChatCompletion, responses=STATUSES)
async def create_chat_completion(body: ChatBody, request: Request, service: Serving) -> Any:
    """The model's next message of a conversation."""
    limits = service.settings.limits
    body.check(limits)

    def make(model: Model) -> list[engine.Request]:
        from ift_peft.serve.inference.asking import chat_requests

        return chat_requests(body, model, limits)

    async def begin(answer: Answer) -> ChatForm:
        model = await answer.begin(body.model, make)
        return ChatForm(model, body.model, answer, choices=body.choices)

    return await _answer(begin, body, request, service)


@router.post("/completions", response_model=Completion, responses=STATUSES)
async def create_completion(body: CompletionBody, request: Request, service: Serving) -> Any:
    """What follows bare texts."""
    limits = service.settings.limits
    body.check(limits)
    echoes: list[str] = []

    def make(model: Model) -> list[engine.Request]:
        from ift_peft.serve.inference.asking import text_requests, texts_of

        requests = text_requests(body, model, limits)  # first, as it refuses prompts that are too long
        if body.echo:
            echoes.extend(texts_of(body, model))
        return requests

    async def begin(answer: Answer) -> TextForm:
        model = await answer.begin(body.model, make)
        return TextForm(model, body.model, answer, choices=body.choices, echoes=echoes)

    return await _answer(begin, body, request, service)


async def _answer(
    begin: Callable[[Answer], Awaitable[ChatForm | TextForm]], body: Sampling, request: Request, service: Service
) -> Any:
    """Whole or streamed. A client that goes away frees what its request holds, in either form."""
    answer = Answer(service.models, service.settings.limits.request_seconds)

    async def work() -> Any:
        form = await begin(answer)
        return form if body.stream else form.whole(await answer.results())

    try:
        done = await unless_gone(request, work())
        if body.stream:
            return EventStream(answer, events(done, answer, tells_usage=body.tells_usage))
        answer.close()
        return done
    except ClientGone:
        answer.close()
        return Response(status_code=GONE)
    except BaseException:
        answer.close()
        raise
