"""A page: how it is rendered, what it may load, and how an error becomes one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

import anyio.to_thread
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from ift_peft.errors import IftPeftError
from ift_peft.serve.errors import ApiError, as_api_error
from ift_peft.serve.pages.templates import template
from ift_peft.serve.security.sessions import COOKIE

log = logging.getLogger("ift_peft.serve")
HINTS = {
    400: "Correct what it names and send it again.",
    403: "The key that you signed in with does not allow this: sign in with another one.",
    404: "It may have been deleted. Jobs and files lists what there is.",
    413: "Send a smaller file, or start the service with higher limits.",
    429: "Wait a moment and try again.",
}
SERVER_FAULT = "Try again; if it happens again, the log of the service says why."


def hint_of(status: int) -> str:
    """What to do about an error of this status."""
    return HINTS.get(status, SERVER_FAULT if status >= 500 else HINTS[400])


def page(request: Request, named: str, /, *, status: int = 200, **values: Any) -> HTMLResponse:
    """The template `named` as an answer; everything in `values` is escaped where it is shown."""
    common = {
        "here": request.scope["path"],
        "base_url": f"{request.scope['scheme']}://{request.headers.get('host', '')}/v1",
        "signed_in": COOKIE in request.cookies,
    }
    return HTMLResponse(template(named).render({**common, **values}), status_code=status)


def to(path: str) -> RedirectResponse:
    """Go on by a GET of `path`, so that reloading repeats nothing."""
    return RedirectResponse(path, status_code=303)


class Page(APIRoute):
    """A route of people: what goes wrong is told in words on a page, and who has no key is asked for one."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def told(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:  # every one is told; those that are unforeseen go into the log as well
                fault = _as_api_error(error, request)
            if fault.status == 401:
                return to("/login")
            return await anyio.to_thread.run_sync(lambda: error_page(request, fault))

        return told


def error_page(request: Request, fault: ApiError) -> HTMLResponse:
    answer = page(
        request,
        "error.html.j2",
        status=fault.status,
        status_code=fault.status,
        message=fault.message,
        hint=hint_of(fault.status),
    )
    answer.headers.update(fault.headers)
    return answer


def _as_api_error(error: Exception, request: Request) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, IftPeftError):
        return as_api_error(error)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return ApiError(400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}", code="invalid_value")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    route = getattr(request.scope.get("route"), "path", None)  # never the path itself, which holds ids
    log.error("page failed", exc_info=error, extra={"route": route})
    return ApiError(500, "The server had an error; its log says which.", code="internal_error")
