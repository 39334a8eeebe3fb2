"""What keeps one client from taking all: queue, time, disconnects; and what is let end when the service stops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from ift_peft.serve.settings import Limits, Settings
from tests.serve.inside import Inside

pytestmark = pytest.mark.slow
LONG: dict[str, Any] = {  # at temperature 2 answers of `tiny` end late
    "model": "tiny",
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "temperature": 2,
    "seed": 3,
    "max_tokens": 400,
}
SHORT = {**LONG, "temperature": 0, "max_tokens": 3}


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Inside]:
    running = Inside(Settings(data_dir=tmp_path / "data", limits=Limits(**request.param))).start()
    yield running
    running.stop()


def rows(server: Inside) -> tuple[int, int]:
    return server.service.models.rows()


@pytest.mark.parametrize("server", [{"rows_together": 1, "waiting_requests": 2}], indirect=True)
def test_a_full_queue_is_told_and_answers_again_later(server: Inside) -> None:
    client = server.client()
    client.chat.completions.create(**SHORT)
    streams = [client.chat.completions.create(stream=True, **LONG)]
    server.until(lambda: rows(server) == (1, 0))
    streams += [client.chat.completions.create(stream=True, **LONG) for _ in range(2)]
    assert rows(server) == (1, 2)
    with pytest.raises(openai.RateLimitError) as raised:
        client.chat.completions.create(stream=True, **LONG)
    assert raised.value.code == "engine_overloaded"
    assert int(raised.value.response.headers["retry-after"]) >= 1
    for stream in streams:
        stream.close()
    server.until(lambda: rows(server) == (0, 0))
    assert client.chat.completions.create(**SHORT).choices


@pytest.mark.parametrize("server", [{"rows_together": 1, "waiting_requests": 4}], indirect=True)
def test_a_refused_request_leaves_none_of_its_choices_behind(server: Inside) -> None:
    client = server.client()
    client.chat.completions.create(**SHORT)
    with client.chat.completions.create(stream=True, **LONG):
        server.until(lambda: rows(server)[0] == 1)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**{**LONG, "n": 8})
    server.until(lambda: rows(server) == (0, 0))


@pytest.mark.parametrize("server", [{"rows_together": 4}], indirect=True)
def test_a_client_that_goes_away_frees_its_rows(server: Inside) -> None:
    client = server.client()
    client.chat.completions.create(**SHORT)
    stream = client.chat.completions.create(stream=True, n=3, **LONG)
    next(stream)
    server.until(lambda: rows(server)[0] == 3)
    stream.close()
    server.until(lambda: rows(server) == (0, 0))

    async def given_up() -> None:
        async with server.async_client() as other:
            task = asyncio.ensure_future(other.chat.completions.create(n=2, **LONG))
            while rows(server)[0] < 2:
                await asyncio.sleep(0.01)
            task.cancel()

    asyncio.run(given_up())
    server.until(lambda: rows(server) == (0, 0))
    server.until(lambda: not server.service.models._holds)


@pytest.mark.parametrize("server", [{"request_seconds": 3.0, "rows_together": 2}], indirect=True)
def test_an_answer_that_takes_too_long_ends_and_frees_its_row(server: Inside) -> None:
    client = server.client()
    try:
        client.chat.completions.create(**SHORT)
    except openai.InternalServerError:  # the base took longer to load; it is there now, or soon
        server.until(lambda: server.service.models.hosts() != [])
    (host,) = server.service.models.hosts()
    with host.stack.lock:  # the engine can make no step
        with pytest.raises(openai.InternalServerError) as raised:
            client.chat.completions.create(**LONG)
        assert (raised.value.status_code, raised.value.code) == (504, "request_timeout")
        stream = client.chat.completions.create(stream=True, **LONG)
        with pytest.raises(openai.APIError) as told:
            list(stream)
        assert told.value.code == "request_timeout"
    server.until(lambda: rows(server) == (0, 0))
    assert client.chat.completions.create(**SHORT).choices


@pytest.mark.parametrize("server", [{}], indirect=True)
def test_first_requests_at_once_load_a_base_once(server: Inside) -> None:
    answers: list[str] = []

    def one(client: OpenAI) -> None:
        answers.append(str(client.chat.completions.create(**SHORT).choices[0].message.content))

    threads = [threading.Thread(target=one, args=(server.client(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8 and len(set(answers)) == 1
    assert len(server.service.models.hosts()) == 1


@pytest.mark.parametrize("server", [{}], indirect=True)
def test_what_is_being_answered_when_the_service_stops_is_answered(server: Inside) -> None:
    client = server.client()
    client.chat.completions.create(**SHORT)
    given = {**LONG, "max_tokens": 150}
    whole = client.chat.completions.create(**given).choices[0]
    stream = client.chat.completions.create(stream=True, **given)
    text = next(stream).choices[0].delta.content or ""
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    chunks = list(stream)
    stopping.join()
    assert text + "".join(one.choices[0].delta.content or "" for one in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
