"""Signing in with a key, and out."""

from __future__ import annotations

import anyio.to_thread
from fastapi import APIRouter, Request, Response

from ift_peft.serve.errors import ApiError
from ift_peft.serve.pages.page import Page, page, to
from ift_peft.serve.security.sessions import NO_COOKIE, secret_of, sign_in, sign_out
from ift_peft.serve.service import Serving

router = APIRouter(route_class=Page, include_in_schema=False)


@router.get("/login")
def login(request: Request) -> Response:
    """The form that asks for a key."""
    return page(request, "login.html.j2", fault=None, hint="")


@router.post("/login")
async def signed_in(request: Request, service: Serving) -> Response:
    """Give the browser a session of its own in the place of the key; the form again where that is not valid."""
    async with request.form(max_files=0, max_fields=2) as form:
        key = str(form.get("key", ""))
    session = await anyio.to_thread.run_sync(sign_in, service.store, key)
    if session is None:
        fault = ApiError(403, "This key is not valid, or no more.", code="invalid_api_key")
        hint = "Check that all of it was copied. Who runs the service lists keys with: ift keys list"
        return page(request, "login.html.j2", status=403, fault=fault, hint=hint)
    answer = to("/")
    answer.headers.append("Set-Cookie", session.cookie)
    return answer


@router.post("/logout")
def signed_out(request: Request, service: Serving) -> Response:
    """End the session, here and in the store."""
    secret = secret_of(request.headers.get("cookie", ""))
    if secret is not None:
        sign_out(service.store, secret)
    answer = to("/login")
    answer.headers.append("Set-Cookie", NO_COOKIE)
    return answer
