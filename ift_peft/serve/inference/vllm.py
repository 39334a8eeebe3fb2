"""A vLLM server in the place of an engine of this process: it is sent the ids of training's prompts, and its tokens are
taken as they come.

Written by vLLM's documentation (0.10 and later: `return_token_ids`), and never run against vLLM itself. Nothing but
the operator's `vllm_url` is asked.
"""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from ift_peft.errors import BusyError, ModelError, first_line
from ift_peft.infer.request import FinishReason, Piece, Request, Stream
from ift_peft.infer.sampling import TokenLogprob

SECONDS = 60.0  # without a byte, after which vLLM is taken for gone
TOKEN = "token_id:"  # noqa: S105 - how vLLM writes tokens as ids


class VllmServer:
    """Its address. Raises `ModelError` for what is no http or https URL."""

    def __init__(self, url: str | None) -> None:
        parts = urlsplit(url or "")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ModelError(
                expected="the URL of a vLLM server", found=repr(url), fix="give --vllm-url http://127.0.0.1:8001"
            )
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1")

    def connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=SECONDS)
        connection.connect()
        return connection

    def send(self, connection: http.client.HTTPConnection, path: str, body: Any) -> http.client.HTTPResponse:
        """The response to a POST, or with no body a GET. Raises `ModelError` for one that is not 200."""
        method = "GET" if body is None else "POST"
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        connection.request(method, f"{self._path}{quote(path)}", content, headers)
        response = connection.getresponse()
        if response.status != 200:
            told = response.read(2000).decode("utf-8", errors="replace")
            raise ModelError(expected=f"200 of vLLM's {path}", found=f"{response.status}: {told}", fix="see vLLM's log")
        return response

    def ask(self, path: str, body: Any = None) -> str:
        """The whole of what is answered. Raises `ModelError` also where there is no server."""
        try:
            connection = self.connect()
            try:
                return self.send(connection, path, body).read().decode("utf-8")
            finally:
                connection.close()
        except (OSError, http.client.HTTPException) as error:
            raise ModelError(
                expected="a vLLM server at vllm_url", found=first_line(error), fix="start it, or correct the URL"
            ) from error

    def models(self) -> dict[str, dict[str, Any]]:
        """What it serves, by name."""
        return {str(one["id"]): one for one in json.loads(self.ask("/v1/models"))["data"]}


class VllmAdapters:
    """The adapters that vLLM was told of. It must run with VLLM_ALLOW_RUNTIME_LORA_UPDATING and see our folders."""

    def __init__(self, server: VllmServer) -> None:
        self._server, self._lock = server, threading.Lock()
        self._names: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._names)

    def load(self, name: str, folder: Path) -> None:
        if name not in self._server.models():  # it may know it from before a restart of ours
            self._server.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        with self._lock:
            self._names.add(name)

    def remove(self, name: str) -> None:
        with self._lock:
            self._names.discard(name)
        with suppress(ModelError):  # it may be gone, and its adapters with it
            self._server.ask("/v1/unload_lora_adapter", {"lora_name": name})


class VllmEngine:
    """Answers `Request`s by a vLLM server; each has a thread that reads what comes."""

    def __init__(self, server: VllmServer, base: str, *, positions: int | None, end_token: int, most: int) -> None:
        """`base` is what vLLM calls the base; at most `most` requests are there at once."""
        self.positions = positions
        self._server, self._base, self._end_token, self._most = server, base, end_token, most
        self._lock = threading.Lock()
        self._at_work: set[_Asked] = set()

    @property
    def running(self) -> int:
        return len(self._at_work)

    @property
    def waiting(self) -> int:
        return 0

    def submit(self, request: Request, *, on_change: Callable[[], None] | None = None) -> Stream:
        """Raises `BusyError` where there are too many."""
        seed = secrets.randbits(63) if request.seed is None else request.seed
        asked = _Asked(request, seed, on_change)
        with self._lock:
            if len(self._at_work) >= self._most:
                raise BusyError(
                    expected=f"fewer than {self._most} requests at vLLM", found=str(self._most), fix="try again later"
                )
            self._at_work.add(asked)
        threading.Thread(target=self._answer, args=(asked,), name="vllm", daemon=True).start()
        return asked

    def stop(self, *, drain: bool = True) -> None:
        """Let what is asked end, or with `drain` False cancel it."""
        for asked in list(self._at_work):
            if not drain:
                asked.cancel()
            with suppress(Exception):
                asked.result(SECONDS)

    def _body(self, asked: _Asked) -> dict[str, Any]:
        request = asked.request
        return {
            "model": request.adapter or self._base,
            "prompt": list(request.prompt),
            "max_tokens": request.max_new_tokens
            if self.positions is None
            else min(request.max_new_tokens, self.positions - len(request.prompt)),
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": asked.seed % 2**63,
            "stop": list(request.stop),
            "stop_token_ids": [self._end_token],
            "logprobs": request.logprobs,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stream": True,
        }

    def _answer(self, asked: _Asked) -> None:
        connection, reason = None, None
        try:
            connection = self._server.connect()
            asked.connected(connection.sock)
            for choice in _choices(self._server.send(connection, "/v1/completions", self._body(asked))):
                if asked.cancelled:
                    break
                piece = _piece(choice, asked.request.logprobs)
                if piece.text or piece.tokens:
                    asked.put(piece)
                reason = choice.get("finish_reason") or reason
            if reason is None and not asked.cancelled:
                raise ModelError(expected="an end of vLLM's answer", found="none", fix="see vLLM's log")
            ended: FinishReason = "cancelled" if asked.cancelled else "length" if reason == "length" else "stop"
            asked.end(ended)
        except Exception as error:
            if asked.cancelled:
                asked.end("cancelled")
            else:
                asked.fail(error)
        finally:
            with self._lock:
                self._at_work.discard(asked)
            if connection is not None:
                connection.close()


class _Asked(Stream):
    """A stream whose cancelling ends its connection, by which vLLM frees the request."""

    _socket: socket.socket | None = None

    def connected(self, to: socket.socket) -> None:
        self._socket = to
        if self.cancelled:
            self.cancel()

    def cancel(self) -> None:
        super().cancel()
        if self._socket is not None and not self.done:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _choices(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Of each server-sent event. Raises `ModelError` for one that is an error."""
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ModelError(expected="an answer of vLLM", found=str(event["error"])[:500], fix="see vLLM's log")
        yield from event["choices"]


def _piece(choice: dict[str, Any], top: int | None) -> Piece:
    if choice.get("token_ids") is None and choice["text"]:
        raise ModelError(
            expected="token_ids in vLLM's answer", found="none", fix="use a vLLM that knows return_token_ids (0.10.2)"
        )
    tokens = tuple(choice.get("token_ids") or ())
    told = choice.get("logprobs")
    if top is None or told is None:
        return Piece(choice["text"], tokens)
    logprobs = tuple(
        TokenLogprob(token, logprob, _top(likeliest or {}, top))
        for token, logprob, likeliest in zip(tokens, told["token_logprobs"], told["top_logprobs"], strict=True)
    )
    return Piece(choice["text"], tokens, logprobs)


def _top(likeliest: dict[str, float], top: int) -> tuple[tuple[int, float], ...]:
    """The `top` likeliest; vLLM adds the token that was taken."""
    pairs = [(int(name.removeprefix(TOKEN)), logprob) for name, logprob in likeliest.items()]
    return tuple(sorted(pairs, key=lambda pair: -pair[1])[:top])
