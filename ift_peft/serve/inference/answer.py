"""One API request while it is answered: its streams on the event loop, with a deadline, freed when the client goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ift_peft.errors import IftPeftError, is_out_of_memory
from ift_peft.serve.errors import ApiError, as_api_error, not_found
from ift_peft.serve.inference.loaded import LoadedModels

if TYPE_CHECKING:
    from ift_peft.infer.request import Completion, Piece, Request, Stream
    from ift_peft.serve.inference.hosts import Model

log = logging.getLogger("ift_peft.serve")
GRACE_SECONDS = 10.0  # after the deadline, for a client to read that it has passed
T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Answer:
    """The streams of one request. `close` frees what it holds; it is for the event loop, and may come twice."""

    def __init__(self, models: LoadedModels, seconds: float) -> None:
        self._models = models
        self._loop = asyncio.get_running_loop()
        self.deadline = self._loop.time() + seconds
        self._timer = self._loop.call_at(self.deadline, self._expire)
        self._changed = asyncio.Event()
        self._held: str | None = None
        self._expired = self._closed = False
        self.streams: list[Stream] = []
        self.requests: Sequence[Request] = ()

    async def begin(self, name: str, make: Callable[[Model], Sequence[Request]]) -> Model:
        """Load the model and put into its queue what `make`, in a thread, asks of it. The model.

        Raises `ApiError`, having closed this.
        """
        try:
            async with asyncio.timeout_at(self.deadline):
                model = await self._models.hold(name)
                self._held = name
                self.requests = await self._loop.run_in_executor(
                    self._models.tokenising, copy_context().run, make, model
                )
            for request in self.requests:
                self._submit(model, request)
        except TimeoutError:
            self.close()
            raise _expired() from None
        except BaseException:
            self.close()
            raise
        return model

    def _submit(self, model: Model, request: Request) -> None:
        try:
            self.streams.append(model.host.engine.submit(request, on_change=self._wake))
        except IftPeftError as error:
            if model.adapter is not None and not model.host.has(model.adapter):  # deleted a moment ago
                raise not_found("model", str(self._held), param="model", code="model_not_found") from None
            raise as_api_error(error) from None

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | Completion]]:
        """What comes, with the number of its stream; the completion of each last. Raises `ApiError`."""
        left = list(range(len(self.streams)))
        while left:
            self._changed.clear()
            for number in list(left):
                stream = self.streams[number]
                done = stream.done  # before what is ready is taken
                for piece in stream.ready():
                    yield number, piece
                if done:
                    left.remove(number)
                    yield number, self._ended(stream)
            if left and self._expired:  # also where the engine is in the middle of something long
                raise _expired()
            if left:
                await self._changed.wait()

    async def results(self) -> list[Completion]:
        """All answers, when the last is there. Raises `ApiError`."""
        async for _ in self.pieces():
            pass
        return [self._ended(stream) for stream in self.streams]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        for stream in self.streams:
            stream.cancel()
        if self._held is not None:
            self._models.release(self._held)

    def _ended(self, stream: Stream) -> Completion:
        if stream.error is not None:
            raise _failed(stream.error)
        assert stream.completion is not None
        if stream.completion.finish_reason == "cancelled":
            if self._expired:
                raise _expired()
            raise ApiError(503, "The service is stopping.", code="engine_stopped", headers={"Retry-After": "5"})
        return stream.completion

    def _expire(self) -> None:
        self._expired = True
        self._changed.set()
        self._timer = self._loop.call_later(GRACE_SECONDS, self.close)
        for stream in self.streams:
            stream.cancel()

    def _wake(self) -> None:
        """From the engine's thread."""
        self._loop.call_soon_threadsafe(self._changed.set)


def _expired() -> ApiError:
    return ApiError(504, "The answer took longer than this service allows.", code="request_timeout")


def _failed(error: Exception) -> ApiError:
    """Of a request that failed while it was answered, which is no fault of what was asked."""
    log.error("answer failed: %s", type(error).__name__)
    if is_out_of_memory(error):
        return ApiError(503, "No memory for this request.", code="out_of_memory", headers={"Retry-After": "1"})
    return ApiError(500, "The model failed; the server's log says how.", code="engine_error")


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled where the client disconnects before. Raises `ClientGone` then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await one


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events of an answer that is closed with the response, however that ends."""

    def __init__(self, answer: Answer, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self._answer.deadline + GRACE_SECONDS):  # of one that reads no more
                await super().__call__(scope, receive, send)
        except TimeoutError:  # the connection is closed with it
            log.warning("a client did not read its answer")
        finally:
            self._answer.close()
