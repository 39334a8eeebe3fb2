"""Bodies that are large to do harm: of many faults, and of more text than any base takes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel, ValidationError

from ift_peft.data import render
from ift_peft.serve.inference.bodies import ChatBody, CompletionBody
from ift_peft.serve.jobs.body import CreateJob
from ift_peft.serve.settings import Limits, Settings
from tests.serve.inside import Inside

MANY = 20_000
MESSAGE = {"role": "user", "content": "a"}
NAMES = {f"k{number}": 1 for number in range(MANY)}
CHAT = {"model": "tiny", "messages": [MESSAGE]}
JOB = {"model": "tiny", "training_file": "file-1"}
FAULTY: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "messages": (ChatBody, {**CHAT, "messages": [{}] * MANY}),
    "too many messages": (ChatBody, {**CHAT, "messages": [MESSAGE] * MANY}),
    "content": (ChatBody, {**CHAT, "messages": [{"role": "user", "content": [1] * MANY}]}),
    "names of a message": (ChatBody, {**CHAT, "messages": [{**MESSAGE, **NAMES}]}),
    "stop": (ChatBody, {**CHAT, "stop": [1] * MANY}),
    "modalities": (ChatBody, {**CHAT, "modalities": [1] * MANY}),
    "metadata": (ChatBody, {**CHAT, "metadata": NAMES}),
    "names": (ChatBody, {**CHAT, **NAMES}),
    "tokens": (CompletionBody, {"model": "tiny", "prompt": [-1] * MANY}),
    "prompts of tokens": (CompletionBody, {"model": "tiny", "prompt": [[-1]] * MANY}),
    "metadata of a job": (CreateJob, {**JOB, "metadata": NAMES}),
    "names of a job": (CreateJob, {**JOB, **NAMES}),
    "hyperparameters": (CreateJob, {**JOB, "hyperparameters": NAMES}),
}


@pytest.mark.parametrize("case", FAULTY)
def test_a_body_of_many_faults_is_told_of_few(case: str) -> None:
    body, given = FAULTY[case]
    with pytest.raises(ValidationError) as raised:
        body.model_validate(given)
    assert raised.value.error_count() <= 4  # one for each form that `prompt` may have


def test_a_prompt_of_many_tokens_is_taken() -> None:
    assert CompletionBody(model="tiny", prompt=[5] * MANY).prompts == [[5] * MANY]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    data = tmp_path_factory.mktemp("bodies") / "data"
    running = Inside(Settings(data_dir=data, limits=Limits(prompt_characters=30_000))).start()
    yield running
    running.stop()


@pytest.mark.slow
def test_a_prompt_of_too_many_characters_is_refused_before_it_is_tokenised(server: Inside) -> None:
    client = server.client()
    half = {"role": "user", "content": "a" * 15_001}

    def refused() -> None:
        for ask in (
            lambda: client.completions.create(model="tiny", prompt=["short", "a" * 30_002]),
            lambda: client.chat.completions.create(model="tiny", messages=[half, half]),
        ):
            with pytest.raises(openai.BadRequestError, match="30002 characters") as raised:
                ask()
            assert raised.value.code == "context_length_exceeded"

    refused()
    (host,) = server.service.models.hosts()
    longest = max(map(len, host.renderer.tokenizer.get_vocab()))
    assert host.most_characters >= host.engine.positions * longest  # what fits is never refused for its characters
    host.most_characters = 15_000
    with pytest.raises(openai.BadRequestError, match="15000 at most"):
        client.chat.completions.create(model="tiny", messages=[half])
    with pytest.raises(openai.BadRequestError, match="resulted in 2000 tokens"):
        client.completions.create(model="tiny", prompt=" a" * 2000)


@pytest.mark.slow
def test_prompts_that_are_being_tokenised_keep_no_other_request_waiting(server: Inside) -> None:
    given: Any = {"model": "tiny", "messages": [MESSAGE], "max_tokens": 1}
    server.client().chat.completions.create(**given)

    async def many() -> None:
        async with server.async_client() as client:
            with render._RENDERING:  # no conversation becomes a prompt
                asked = [asyncio.ensure_future(client.chat.completions.create(**given)) for _ in range(40)]
                await asyncio.sleep(0.5)
                with pytest.raises(openai.NotFoundError):
                    await client.chat.completions.create(**{**given, "model": "nothing"}, timeout=5)
                assert not any(one.done() for one in asked)
            assert len(await asyncio.gather(*asked)) == 40

    asyncio.run(many())
