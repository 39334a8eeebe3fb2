"""The gate in front of every route: name, origin, key, scope, rate, and the size of what comes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import anyio
import anyio.to_thread
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ift_peft.errors import SettingsError
from ift_peft.serve.errors import ApiError, response_of
from ift_peft.serve.security.bodies import limited
from ift_peft.serve.security.hosts import allowed_names, is_allowed, is_loopback, same_origin
from ift_peft.serve.security.keys import SCOPES, Caller, check_key, key_exists
from ift_peft.serve.security.rates import Rates
from ift_peft.serve.security.scopes import scopes_for
from ift_peft.serve.security.sessions import check_session, secret_of
from ift_peft.serve.settings import Settings
from ift_peft.serve.store import Store

SAFE = ("GET", "HEAD", "OPTIONS")
UPLOADS = re.compile(r"/v1/files/?|/files/?")
"""Whose routes count the body themselves."""
STATIC = re.compile(r"/static/[^/]*")
PROBES = ("/healthz",)
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
OWNER = Caller(None, frozenset(SCOPES))
NOBODY = Caller(None, frozenset())


def require_key(settings: Settings, store: Store) -> None:
    """Raises `SettingsError` for a service without a key that others could reach, or that is said to need one."""
    public = not is_loopback(settings.host)
    if (public or settings.require_key) and not key_exists(store):
        option = f"--host {settings.host}" if public else "--require-key"
        raise SettingsError(
            expected=f"a key, where others can reach the service ({option})",
            found="none",
            fix=f"ift keys create first --data-dir {settings.data_dir}, or leave {option.split()[0]} out",
        )


class Guard:
    """Pure ASGI: nothing of a stream is held back. Puts the `Caller` into `request.state.caller`.

    People at the dashboard are told what is refused by `error_page`.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, store: Store, error_page: Callable[[Request, ApiError], Response]
    ) -> None:
        self.app, self.settings, self.store, self.error_page = app, settings, store, error_page
        self.names = allowed_names(settings)
        self.rates = Rates(settings.limits.requests_per_minute)
        self._threads = anyio.CapacityLimiter(8)  # of their own: those of the routes may all be waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in PROBES):
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        limits = self.settings.limits
        most = None if UPLOADS.fullmatch(scope["path"]) else limits.body_bytes
        try:
            await self._admit(scope, most)
        except ApiError as error:
            await self._refusal(scope, error)(scope, receive, send)
            return
        await self.app(scope, limited(receive, most=most, seconds=limits.body_seconds), send)

    def _refusal(self, scope: Scope, error: ApiError) -> Response:
        if not _is_page(scope):
            return response_of(error)
        return RedirectResponse("/login", 303) if error.status == 401 else self.error_page(Request(scope), error)

    async def _admit(self, scope: Scope, most: int | None) -> None:
        """Raises `ApiError` for what is not let in. Who asks is noted before it is known whether they may."""
        headers, method = Headers(scope=scope), scope["method"]
        host = self._host(headers)
        if method not in SAFE and _is_foreign(headers, host):
            raise ApiError(403, "The request comes from a page of another origin.", code="origin_not_allowed")
        address = scope["client"][0] if scope.get("client") else ""
        needed = scopes_for(method, scope["path"])
        caller: Caller | None = NOBODY
        if needed is not None:
            caller = await anyio.to_thread.run_sync(self._caller, headers, address, limiter=self._threads)
        if not STATIC.fullmatch(scope["path"]):
            self._rate(_bucket(caller, address))
        if caller is None:
            raise ApiError(
                401,
                "No valid API key was given. Send one as `Authorization: Bearer sk-ift-…`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        scope.setdefault("state", {})["caller"] = caller
        if needed is not None and not caller.may(needed):
            raise ApiError(
                403, f"This key lacks a scope that the request needs: {' or '.join(needed)}.", code="insufficient_scope"
            )
        session = caller.session or (caller is NOBODY and secret_of(headers.get("cookie", "")) is not None)
        if session and method not in SAFE and not _from_here(headers, host):
            raise ApiError(
                403, "With a session, requests come from the service's own pages.", code="origin_not_allowed"
            )
        length = headers.get("content-length", "")
        if most is not None and length.isdecimal() and int(length[:20]) > most:
            raise ApiError(413, f"The body is larger than {most:,} bytes.", code="request_too_large")

    def _host(self, headers: Headers) -> str:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not is_allowed(hosts[0], self.names):
            raise ApiError(
                421,
                "This service does not answer to the name in the header Host. It is told further ones by "
                "`ift serve --allowed-host NAME`.",
                code="host_not_allowed",
            )
        return hosts[0]

    def _caller(self, headers: Headers, address: str) -> Caller | None:
        """By key, by session, or the owner on the same machine while there are no keys; None for nobody known."""
        if not key_exists(self.store):
            direct = is_loopback(address) and not any(name in headers for name in FORWARDED)
            return OWNER if direct else None
        given = headers.get("authorization")
        if given is not None:
            kind, _, text = given.partition(" ")
            return check_key(self.store, text.strip()) if kind.lower() == "bearer" else None
        secret = secret_of(headers.get("cookie", ""))
        return None if secret is None else check_session(self.store, secret)

    def _rate(self, who: str) -> None:
        wait = self.rates.wait(who)
        if wait:
            raise ApiError(
                429,
                f"More than {self.rates.per_minute} requests a minute.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(math.ceil(wait))},
            )


def _bucket(caller: Caller | None, address: str) -> str:
    """Whose rate a request counts for. Of an address, guesses at keys leave what needs none, as signing in, alone."""
    if caller is None:
        return f"refused {address}"
    return f"address {address}" if caller.key is None else caller.key


def _is_page(scope: Scope) -> bool:
    """Whether a person is looking at the dashboard, and not a program at the API."""
    accepts = "text/html" in Headers(scope=scope).get("accept", "")
    return accepts and not scope["path"].startswith("/v1/")


def _is_foreign(headers: Headers, host: str) -> bool:
    """Whether a browser says that another page made the request. It sends no key of its own accord: who has, may."""
    if "origin" in headers:
        return not all(same_origin(origin, host) for origin in headers.getlist("origin"))
    told = "referer" in headers and "authorization" not in headers
    return told and not same_origin(headers["referer"], host)


def _from_here(headers: Headers, host: str) -> bool:
    """Whether a browser says that one of this service's pages made the request; other origins are refused before."""
    here = "origin" in headers or headers.get("sec-fetch-site") == "same-origin"
    return here or same_origin(headers.get("referer", ""), host)
