"""Each request gets an id, a line in the log and a place in the figures; what goes wrong inside gets an answer."""

from __future__ import annotations

import logging
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ift_peft.serve.errors import ApiError, response_of
from ift_peft.serve.ids import new_id
from ift_peft.serve.operations.metrics import Metrics

log = logging.getLogger("ift_peft.serve.requests")
OTHER = "(none)"
GONE = 499  # in the log: the client went away before it had sent all
METHODS = ("GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Observed:
    """Pure ASGI, around all that may fail. `X-Request-Id` is the client's, where it sent a plain one."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else new_id("req")
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.monotonic()
        status = 0

        async def send_observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_observed)
        except ClientDisconnect:  # nobody is there to be answered
            status = status or GONE
        except Exception as error:  # whatever it is, the client is told in the one form, and the log where
            log.error("request failed", exc_info=error, extra={"request": request_id})
            if not status:
                fault = ApiError(500, "The server had an error; its log says which.", code="internal_error")
                await response_of(fault)(scope, receive, send_observed)
            else:
                raise
        finally:
            self._record(scope, request_id, status, time.monotonic() - started)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = _template(scope)
        method = scope["method"] if scope["method"] in METHODS else OTHER
        self.metrics.requests.labels(route, method, str(status)).inc()
        self.metrics.seconds.labels(route, method).observe(seconds)
        caller = scope["state"].get("caller")
        extra = {
            "request": request_id,
            "method": method,
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            "key": None if caller is None else caller.id,
        }
        log.info("request", extra=extra)


def _template(scope: Scope) -> str:
    """The path of the route with its parameters' names, never their values. An included route knows no prefix."""
    path: str | None = getattr(scope.get("route"), "path", None)
    if path is None:
        return OTHER
    included = scope["path"].startswith("/v1/") and not path.startswith("/v1/")
    return f"/v1{path}" if included else path
