"""Errors as OpenAI's clients read them: `{"error": {message, type, param, code}}`, for everything that goes wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ift_peft.errors import BusyError, DiskFull, IftPeftError, is_full

CODES = {404: "unknown_url", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large"}
UNSUPPORTED = "unsupported_parameter"  # the type of pydantic's error, and the code of ours
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error. `type` follows from the status: 4xx is the client's fault, 5xx ours."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def again(self) -> ApiError:
        """The same, for one more who is told: an error that is raised keeps where it came through."""
        return ApiError(self.status, self.message, code=self.code, param=self.param, headers=self.headers)


def not_found(what: str, name: str, *, param: str, code: str = "not_found") -> ApiError:
    """404, as of a file that is not there."""
    return ApiError(404, f"No such {what}: {name!r}.", code=code, param=param)


def no_room() -> ApiError:
    """507, of a disk that is full. What was written before stays."""
    return ApiError(507, "There is no room for it on the server's disk.", code="insufficient_storage")


def body_of(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error; also of one inside a stream that has begun."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response_of(error: ApiError) -> JSONResponse:
    body = body_of(error.status, error.message, code=error.code, param=error.param)
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def told(error: IftPeftError) -> str:
    """One of the library's errors in a line."""
    return f"expected {error.expected}; found {error.found}; {error.fix}"


def as_api_error(error: IftPeftError, *, param: str | None = None) -> ApiError:
    """A fault of what was asked for: 400; 429 where it is only the moment that is wrong, 507 where it is the disk."""
    if isinstance(error, BusyError):
        return ApiError(429, told(error), code="engine_overloaded", headers={"Retry-After": "1"})
    if isinstance(error, DiskFull):
        return no_room()
    return ApiError(400, str(error), code="invalid_request", param=param)


def _param(place: Sequence[int | str], *, whole: bool) -> str:
    """Where a fault is as clients know it, `messages.0.content`: without the kinds that pydantic tried there.

    The last part of a `whole` place is a client's own name, whatever it is called.
    """
    tried = ("body", "query", "path", "str", "int", "float", "bool")
    known = [part for part in place if part not in tried and (isinstance(part, int) or part.isidentifier())]
    if whole and place and known[-1:] != [place[-1]]:
        known.append(place[-1])
    return ".".join(map(str, known))


def install_handlers(app: FastAPI) -> None:
    """Give every error of `app` the one form. What is unforeseen goes on to `Observed`, which tells it."""

    @app.exception_handler(ApiError)
    async def _ours(request: Request, error: ApiError) -> JSONResponse:
        return response_of(error)

    @app.exception_handler(IftPeftError)
    async def _library(request: Request, error: IftPeftError) -> JSONResponse:
        return response_of(as_api_error(error))

    @app.exception_handler(OSError)
    async def _disk(request: Request, error: OSError) -> JSONResponse:
        if not is_full(error):
            raise error
        return response_of(no_room())

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = error.errors()
        first = next((one for one in faults if one["type"] == UNSUPPORTED), faults[0])
        param = _param(first["loc"], whole=first["type"] == "extra_forbidden")
        unknown = first["type"] == "extra_forbidden"
        message = (
            f"Unrecognized request argument supplied: {param}" if unknown else f"{param or 'body'}: {first['msg']}"
        )
        more = len(faults) - 1
        message += f" (and {more} more)" if more else ""
        code = {"extra_forbidden": "unknown_parameter", UNSUPPORTED: UNSUPPORTED}.get(first["type"], "invalid_value")
        return response_of(ApiError(400, message, code=code, param=param or None))

    @app.exception_handler(HTTPException)
    async def _framework(request: Request, error: HTTPException) -> JSONResponse:
        code = CODES.get(error.status_code)
        what = f"{request.method} {request.url.path}"
        message = f"Unknown request URL: {what}." if error.status_code == 404 else f"{error.detail}: {what}"
        return response_of(ApiError(error.status_code, message, code=code, headers=error.headers))
