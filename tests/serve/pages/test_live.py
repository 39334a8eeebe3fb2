"""The stream of a job's page: what it sends, where it goes on, when it ends, and how many there may be."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import anyio
import httpx
import pytest

from ift_peft.serve.errors import ApiError
from ift_peft.serve.pages import live
from ift_peft.serve.pages.job_view import Curves
from ift_peft.serve.pages.live import Followed, Stream
from ift_peft.serve.pages.streams import Streams
from ift_peft.serve.service import Service
from ift_peft.serve.settings import Settings
from tests.serve.pages import data
from tests.serve.pages.conftest import Board

T = TypeVar("T")


def messages(lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Id and content of each message of a stream."""
    number = 0
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "id":
            number = int(value)
        elif name == "data":
            yield number, json.loads(value)


def in_a_thread(call: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Run it in an event loop of its own: the browser of other tests has one in this thread."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(anyio.run, call, *arguments).result()


@pytest.fixture
def service(tmp_path: Any) -> Iterator[Service]:
    """Of this process, and not started."""
    made = Service(Settings(data_dir=tmp_path / "data"))
    yield made
    made.store.close()
    made._lock.close()


@pytest.mark.slow
def test_a_stream_goes_on_behind_the_last_event_that_was_seen_and_ends_with_its_job(board: Board) -> None:
    job_id = data.add_job(board.data_dir, training_file=board.file)
    data.tell_step(board.data_dir, job_id, 1, 3.0)
    url = f"{board.url}/jobs/{job_id}/stream"
    with httpx.stream("GET", url, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        first, content = next(messages(answer.iter_lines()))
        assert {"curves", "events", "status", "actions"} <= set(content["parts"])
    with httpx.stream("GET", url, headers={"Last-Event-ID": str(first)}, timeout=30) as answer:
        found = messages(answer.iter_lines())
        assert not {"curves", "events"} & set(next(found)[1]["parts"])
        data.tell_step(board.data_dir, job_id, 2, 2.0)
        number, content = next(found)
        assert number > first
        assert "step 2 of 120" in content["parts"]["progress"]
        assert "curves" in content["parts"]
        assert "status" not in content["parts"]
        data.tell(board.data_dir, job_id, "cancelled by hand")
        data.change_job(board.data_dir, job_id, status="cancelled")
        last = list(found)[-1][1]  # and no more: the stream has ended
    assert last["final"]
    with httpx.stream("GET", url, timeout=30) as answer:
        assert [content["final"] for _, content in messages(answer.iter_lines())] == [True]
    assert httpx.get(f"{board.url}/jobs/ftjob-none/stream").status_code == 404


def test_no_more_streams_than_there_are_places_for(service: Service) -> None:
    streams = Streams(2)
    streams.enter()
    streams.enter()
    with pytest.raises(ApiError) as told:
        streams.enter()
    assert (told.value.status, told.value.headers["Retry-After"]) == (503, "10")
    streams.leave()
    streams.enter()
    streams.leave()
    streams.close()
    with pytest.raises(ApiError):
        streams.enter()


@pytest.mark.parametrize("received", ["http.disconnect", None])
def test_a_place_is_given_back_by_those_who_leave_and_by_those_whose_job_ends(
    service: Service, received: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "EVERY", 0.01)
    job_id = data.add_job(service.settings.data_dir, training_file="file-none")
    service.streams.enter()
    answer = Stream(
        live._messages(Followed(service, job_id), 0, service.streams, allowed=lambda: True), service.streams
    )
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        while not any(b"update" in message.get("body", b"") for message in sent):
            await anyio.sleep(0.01)
        if received is None:
            data.change_job(service.settings.data_dir, job_id, status="failed")
            await anyio.sleep_forever()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def serve() -> None:
        with anyio.fail_after(30):
            await answer({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)  # type: ignore[arg-type]

    in_a_thread(serve)
    assert service.streams.open == 0
    assert sent[0]["status"] == 200


def test_silence_is_filled_with_comments(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EVERY", 0.01)
    monkeypatch.setattr(live, "HEARTBEAT", 0.0)
    job_id = data.add_job(service.settings.data_dir, training_file="file-none")

    async def first(count: int) -> list[str]:
        found = []
        async for message in live._messages(Followed(service, job_id), 0, service.streams, allowed=lambda: True):
            found.append(message)
            if len(found) == count:
                service.streams.close()  # which ends it
        return found

    told = in_a_thread(first, 4)
    assert told[2:] == [": alive\n\n"] * 2


def test_a_step_that_was_trained_again_has_its_newer_value() -> None:
    curves = Curves()
    lines = [(1, 3.0), (2, 2.0), (3, float("nan")), (2, 1.5)]
    curves.add([{"type": "metrics", "data": {"step": step, "train_loss": loss}} for step, loss in lines])  # type: ignore[misc]
    curves.add([{"type": "metrics", "data": None}, {"type": "message", "data": {"step": 9, "train_loss": 9}}])  # type: ignore[list-item]
    assert curves.points["train_loss"] == {1.0: 3.0, 2.0: 1.5}
    assert [chart.name for chart in curves.charts()] == ["training loss"]
