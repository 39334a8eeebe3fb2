"""Bodies of requests: not too large, and not too slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive

SLOWEST = 1024  # bytes a second


def limited(
    receive: Receive, *, most: int | None, seconds: float, clock: Callable[[], float] = time.monotonic
) -> Receive:
    """`receive`, which raises `HTTPException` for a body of more than `most` bytes (413), counted as it comes.

    And for one (408) that after `seconds` has come at less than 1 KiB a second. What follows the body is left alone.
    """
    received, ended = 0, False
    started: float | None = None

    async def receive_limited() -> Message:
        nonlocal received, ended, started
        if ended:
            return await receive()
        started = clock() if started is None else started
        try:
            async with asyncio.timeout(seconds + received / SLOWEST - (clock() - started)):
                message = await receive()
        except TimeoutError:
            ended = True
            raise HTTPException(408, "The body came too slowly", {"Connection": "close"}) from None
        if message["type"] == "http.request":
            received += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if most is not None and received > most:
                ended = True
                raise HTTPException(413, f"The body is larger than {most:,} bytes")
        else:
            ended = True
        return message

    return receive_limited
