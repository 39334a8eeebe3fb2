"""What the forms do: the calls of the API, made inside the process with the caller's own cookie.

So a form is checked, limited and refused by the very code that answers a client, and tells the very same errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

import anyio
from fastapi import Request
from starlette.types import Message, Receive, Scope

from ift_peft.serve.errors import ApiError

JOBS = "/v1/fine_tuning/jobs"
OF_A_BODY = (b"content-type", b"content-length", b"content-encoding", b"transfer-encoding", b"expect")
SCOPE = ("type", "asgi", "http_version", "scheme", "root_path", "client", "server")


async def create_job(request: Request, wanted: Mapping[str, Any], *, once: str) -> str:
    """Create a job and return its id; the same `once` never creates a second one. Raises `ApiError`."""
    job = await ask(request, "POST", JOBS, wanted, headers={"idempotency-key": once})
    return str(job["id"])


async def act_on_job(request: Request, job_id: str, action: str) -> None:
    """Cancel, pause or resume a job. Raises `ApiError`."""
    await ask(request, "POST", f"{JOBS}/{quote(job_id, safe='')}/{action}")


async def delete_file(request: Request, file_id: str) -> None:
    """Delete a file for good. Raises `ApiError`."""
    await ask(request, "DELETE", f"/v1/files/{quote(file_id, safe='')}")


async def upload(request: Request) -> str:
    """Hand the form on to the API piece by piece as it comes, and return the file's id. Raises `ApiError`."""
    headers = [(name, value) for name, value in request.headers.raw if name in OF_A_BODY]
    uploaded = await _call(_scope(request, "POST", "/v1/files", headers), request.receive, request)
    return str(uploaded["id"])


async def chat(request: Request, model: str, prompt: str, *, max_completion_tokens: int) -> str:
    """The model's likeliest answer. Raises `ApiError`."""
    wanted = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_completion_tokens": max_completion_tokens,
    }
    answer = await ask(request, "POST", "/v1/chat/completions", wanted)
    return str(answer["choices"][0]["message"]["content"])


async def ask(
    request: Request,
    method: str,
    path: str,
    content: Mapping[str, Any] | None = None,
    *,
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What the API answers to the one who sent `request`. Raises `ApiError` for the error that it answers with."""
    body = b"" if content is None else json.dumps(content, ensure_ascii=False).encode()
    given = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given.items()]
    return await _call(_scope(request, method, path, encoded), _sending(body), request)


def _scope(request: Request, method: str, path: str, headers: list[tuple[bytes, bytes]]) -> Scope:
    passed_on = [(name, value) for name, value in request.headers.raw if name not in OF_A_BODY]
    return {
        **{key: request.scope[key] for key in SCOPE if key in request.scope},
        "method": method,
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": passed_on + headers,
    }


def _sending(body: bytes) -> Receive:
    """A client that sends `body`, and then waits for the answer."""
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await anyio.sleep_forever()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _call(scope: Scope, receive: Receive, request: Request) -> dict[str, Any]:
    status, headers, pieces = 500, dict[str, str](), list[bytes]()

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            pieces.append(message.get("body", b""))

    await request.app(scope, receive, send)
    answer: dict[str, Any] = json.loads(b"".join(pieces))
    if status < 400:
        return answer
    error = answer["error"]
    kept = {name: headers[name] for name in ("retry-after",) if name in headers}
    raise ApiError(status, error["message"], code=error["code"], param=error["param"], headers=kept)
