"""Chat and text completions of a real server, asked by the unmodified client, against the library's own answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import cache
from typing import Any

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from ift_peft.infer.load import load_model, open_parts
from ift_peft.infer.predict import generate
from ift_peft.serve.store import Store
from tests.serve.conftest import Server
from tests.serve.tuned import changed_copy, record, train_briefly

pytestmark = pytest.mark.slow
QUESTION = [{"role": "user", "content": "What is 3 plus one?"}]
TUNED = "ft:tiny:local::first000"
OTHERS = [f"ft:tiny:local::other00{number}" for number in range(3)]
CHECKPOINT = f"{TUNED}:ckpt-step-2"
MOST = 24


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With one tuned model, a checkpoint of it, and three others."""
    running = Server(tmp_path_factory.mktemp("serve") / "data")
    running.data_dir.mkdir()
    store = Store(f"sqlite:///{running.data_dir / 'store.sqlite'}")
    run = train_briefly(running.data_dir, "ftjob-first")
    record(store, running.data_dir, run, TUNED)
    record(store, running.data_dir, run, CHECKPOINT, step=2)
    for number, name in enumerate(OTHERS):
        record(store, running.data_dir, changed_copy(run, f"ftjob-other{number}", number), name)
    store.close()
    running.start()
    yield running
    running.stop()
    assert "Traceback" not in running.log, running.log


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client()


def ask(client: OpenAI, model: str, **more: Any) -> ChatCompletion:
    given = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": MOST, **more}
    return ChatCompletion.model_validate(client.chat.completions.create(**given).model_dump())


def stream(client: OpenAI, model: str, **more: Any) -> list[ChatCompletionChunk]:
    given = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": MOST, "stream": True, **more}
    return [ChatCompletionChunk.model_validate(one.model_dump()) for one in client.chat.completions.create(**given)]


def text_of(chunks: list[ChatCompletionChunk], choice: int = 0) -> str:
    parts = [one for chunk in chunks for one in chunk.choices if one.index == choice]
    assert parts[0].delta.role == "assistant"
    assert [part.finish_reason is None for part in parts] == [True] * (len(parts) - 1) + [False]
    return "".join(part.delta.content or "" for part in parts)


@pytest.fixture(scope="module")
def library(server: Server) -> Any:
    """The library's model of a name, opened from the run's folder."""

    @cache
    def opened(name: str) -> tuple[Any, Any]:
        job = {TUNED: "ftjob-first", CHECKPOINT: "ftjob-first"} | {
            other: f"ftjob-other{number}" for number, other in enumerate(OTHERS)
        }
        (run,) = (server.data_dir / "runs" / job[name]).glob("2*")
        from ift_peft.run_dir import RunDir

        parts = open_parts(RunDir(run))
        return load_model(parts, adapter=run / "checkpoints" / "checkpoint-2" if name == CHECKPOINT else None)[0], parts

    return opened


@pytest.mark.parametrize("name", [TUNED, CHECKPOINT, OTHERS[0]])
def test_streamed_whole_and_the_librarys_answer_are_one(client: OpenAI, library: Any, name: str) -> None:
    model, parts = library(name)
    expected = generate(model, parts, parts.converse(QUESTION).messages, max_new_tokens=MOST)
    whole = ask(client, name)
    assert whole.choices[0].message.content.strip() == expected
    assert text_of(stream(client, name)) == whole.choices[0].message.content
    assert expected != ask(client, "tiny").choices[0].message.content


def test_what_is_counted_is_what_the_library_renders(client: OpenAI, library: Any) -> None:
    _, parts = library(TUNED)
    (ids,) = parts.renderer.prompts([parts.converse(QUESTION).messages])
    whole = ask(client, TUNED)
    chunks = stream(client, TUNED, stream_options={"include_usage": True})
    assert whole.usage.prompt_tokens == len(ids)
    assert whole.usage.total_tokens == len(ids) + whole.usage.completion_tokens
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
    assert whole.system_fingerprint != ask(client, OTHERS[0]).system_fingerprint


def test_an_own_system_message_replaces_the_one_of_training(client: OpenAI, library: Any) -> None:
    model, parts = library(TUNED)
    own = [{"role": "system", "content": "Say nothing but numbers."}, *QUESTION]
    expected = generate(model, parts, own, max_new_tokens=MOST)
    as_developer = [{"role": "developer", "content": [{"type": "text", "text": own[0]["content"]}]}, *QUESTION]
    for messages in (own, as_developer):
        assert ask(client, TUNED, messages=messages).choices[0].message.content.strip() == expected


def test_choices_differ_and_come_again_with_their_seed(client: OpenAI) -> None:
    asked = {"temperature": 1.2, "seed": 7, "n": 4}
    texts = [one.message.content for one in ask(client, "tiny", **asked).choices]
    assert len(set(texts)) > 1
    assert [one.message.content for one in ask(client, "tiny", **asked).choices] == texts
    chunks = stream(client, "tiny", **asked)
    assert [text_of(chunks, number) for number in range(4)] == texts
    assert ask(client, "tiny", temperature=1.2, seed=7).choices[0].message.content == texts[0]
    assert ask(client, "tiny", temperature=1.2, top_p=0, seed=7) != texts[0]


def test_top_p_of_0_takes_the_likeliest(client: OpenAI) -> None:
    greedy = ask(client, OTHERS[0]).choices[0].message.content
    assert ask(client, OTHERS[0], temperature=2, top_p=0).choices[0].message.content == greedy


def test_an_answer_ends_before_a_stop_string(client: OpenAI) -> None:
    whole = ask(client, TUNED).choices[0].message.content
    assert whole.startswith("It is ")
    for stop, expected in ((" is", "It"), (["zzz", "t i"], "I"), (["It"], "")):
        cut = ask(client, TUNED, stop=stop).choices[0]
        assert (cut.message.content, cut.finish_reason) == (expected, "stop")
        assert text_of(stream(client, TUNED, stop=stop)) == expected


def test_an_answer_that_is_too_long_says_so(client: OpenAI) -> None:
    cut = ask(client, TUNED, max_tokens=2)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 2)
    assert ask(client, TUNED, max_tokens=None, max_completion_tokens=2).choices[0] == cut.choices[0]


def test_logprobs_are_those_of_the_model(client: OpenAI, library: Any) -> None:
    model, parts = library(OTHERS[1])
    choice = ask(client, OTHERS[1], logprobs=True, top_logprobs=3, max_tokens=8).choices[0]
    told = choice.logprobs.content
    assert b"".join(bytes(one.bytes) for one in told).decode(errors="replace") == choice.message.content
    (ids,) = parts.renderer.prompts([parts.converse(QUESTION).messages])
    expected = []
    for one in told:
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        values, tokens = logs.topk(3)
        expected.append(float(values[0]))
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(values.tolist(), abs=1e-3)
        ids = [*ids, int(tokens[0])]
    assert sum(one.logprob for one in told) == pytest.approx(sum(expected), abs=1e-2)
    chunks = stream(client, OTHERS[1], logprobs=True, top_logprobs=3, max_tokens=8)
    streamed = [one for chunk in chunks for part in chunk.choices if part.logprobs for one in part.logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in told]


def test_logprobs_end_with_the_text_before_a_stop_string(client: OpenAI) -> None:
    asked: dict[str, Any] = {"logprobs": True, "stop": "is 2"}
    whole = ask(client, TUNED).choices[0].message.content
    assert whole.startswith("It is ")
    asked["stop"] = whole[3:7]
    choice = ask(client, TUNED, **asked).choices[0]
    told = [one.token for one in choice.logprobs.content]
    assert choice.message.content == "It "
    assert len("".join(told[:-1])) < 3 <= len("".join(told)) < len(whole[:7])
    chunks = stream(client, TUNED, **asked)
    streamed = [one for chunk in chunks for part in chunk.choices if part.logprobs for one in part.logprobs.content]
    assert [one.token for one in streamed] == told
    given = {"model": "tiny", "prompt": "The weather", "temperature": 0, "max_tokens": 6, "logprobs": 0}
    free = client.completions.create(**given).choices[0]
    stop = "".join(free.logprobs.tokens[2:4])
    cut = client.completions.create(stop=stop, **given)
    assert cut.choices[0].text == free.text[: free.text.index(stop)]
    told = cut.choices[0].logprobs.tokens
    assert "".join(told) == cut.choices[0].text and cut.usage.completion_tokens > len(told)
    parts = [one.choices[0].logprobs for one in client.completions.create(stream=True, stop=stop, **given)]
    assert [token for part in parts if part for token in part.tokens] == told


def test_texts_are_completed_in_any_form_of_prompt(client: OpenAI, library: Any) -> None:
    _, parts = library(TUNED)
    texts = ["The weather", "今天天气"]
    ids = [parts.tokenizer(text)["input_ids"] for text in texts]
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 6}

    def completed(prompt: Any, **more: Any) -> list[str]:
        done = client.completions.create(prompt=prompt, **{**asked, **more})
        Completion.model_validate(done.model_dump())
        return [one.text for one in done.choices]

    both = completed(texts)
    assert both == completed(ids) == [*completed(texts[0]), *completed(ids[1])]
    assert completed(texts, n=2) == [both[0], both[0], both[1], both[1]]
    assert completed(texts, echo=True) == [text + more for text, more in zip(texts, both, strict=True)]
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=texts, stream=True, echo=True, **asked):
        for one in chunk.choices:
            streamed[one.index] += one.text
    assert streamed == completed(texts, echo=True)
    assert client.completions.create(**{**asked, "max_tokens": None}, prompt="The").usage.completion_tokens <= 16


def test_logprobs_of_completed_texts(client: OpenAI) -> None:
    asked = {"model": "tiny", "prompt": "The weather", "temperature": 0, "max_tokens": 6, "logprobs": 2}
    choice = client.completions.create(**asked).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    assert [choice.text[at:].startswith(token) for at, token in zip(told.text_offset, told.tokens, strict=True)]
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())
    streamed = [one.choices[0] for one in client.completions.create(stream=True, **asked)]
    parts = [one.logprobs for one in streamed if one.logprobs]
    assert [offset for part in parts for offset in part.text_offset] == told.text_offset
    assert [one for part in parts for one in part.token_logprobs] == pytest.approx(told.token_logprobs)


REFUSED = {
    "tools": ([{"type": "function", "function": {"name": "f"}}], "unsupported_parameter"),
    "tool_choice": ("none", "unsupported_parameter"),
    "functions": ([{"name": "f"}], "unsupported_parameter"),
    "response_format": ({"type": "json_object"}, "unsupported_parameter"),
    "logit_bias": ({"5": 1}, "unsupported_parameter"),
    "frequency_penalty": (0.5, "unsupported_parameter"),
    "presence_penalty": (-1, "unsupported_parameter"),
    "modalities": (["text", "audio"], "unsupported_parameter"),
    "audio": ({"voice": "x", "format": "wav"}, "unsupported_parameter"),
    "service_tier": ("flex", "unsupported_parameter"),
    "store": (True, "unsupported_parameter"),
    "reasoning_effort": ("low", "unsupported_parameter"),
    "messages": ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "unsupported_parameter"),
    "extra_body": ({"top_k": 3}, "unknown_parameter"),
    "n": (9, "invalid_value"),
    "max_tokens": (5000, "invalid_value"),
    "temperature": (2.5, "invalid_value"),
    "stop": (["a", "b", "c", "d", "e"], "invalid_value"),
    "top_logprobs": (3, "invalid_value"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_is_refused_by_name(client: OpenAI, name: str) -> None:
    value, code = REFUSED[name]
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, "tiny", **{name: value})
    assert raised.value.code == code
    assert {"extra_body": "top_k", "top_logprobs": "top_logprobs"}.get(name, name) in raised.value.message


def test_images_are_refused(client: OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, "tiny", messages=[{"role": "user", "content": [image]}])
    assert (raised.value.code, raised.value.param) == ("unsupported_parameter", "messages.0.content.0")


def test_half_a_character_is_refused(server: Server) -> None:
    import httpx

    body = '{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}'
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages.0.content")


def test_what_changes_nothing_is_taken(client: OpenAI) -> None:
    harmless = {
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "modalities": ["text"],
    }
    assert ask(client, TUNED, **harmless).choices == ask(client, TUNED).choices


def test_an_answer_can_be_sent_back(client: OpenAI) -> None:
    message = ask(client, TUNED).choices[0].message.model_dump()
    assert ask(client, TUNED, messages=[*QUESTION, message, *QUESTION]).choices[0].message.content


def test_a_prompt_longer_than_the_base_is_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, "tiny", messages=[{"role": "user", "content": "one two " * 600}])
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="tiny", prompt=[5] * 512)
    assert raised.value.code == "context_length_exceeded"


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    for name in ("nothing", "../first", "tiny "):
        with pytest.raises(openai.NotFoundError) as raised:
            ask(client, name)
        assert raised.value.code == "model_not_found"


def test_chats_with_several_adapters_at_once_are_answered_as_alone(server: Server, client: OpenAI) -> None:
    names = [TUNED, *OTHERS]
    questions = [f"What is {number} plus one?" for number in range(24)]

    def given(number: int) -> dict[str, Any]:
        return {
            "model": names[number % len(names)],
            "messages": [{"role": "user", "content": questions[number]}],
            "temperature": 0,
            "max_tokens": MOST,
        }

    alone = [client.chat.completions.create(**given(number)).choices[0].message.content for number in range(24)]

    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as many:

            async def one(number: int) -> str:
                parts = await many.chat.completions.create(stream=True, **given(number))
                return "".join([part.choices[0].delta.content or "" async for part in parts])

            return list(await asyncio.gather(*map(one, range(24))))

    assert asyncio.run(together()) == alone
    assert len(set(alone)) > len(names)
