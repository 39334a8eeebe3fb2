"""Serving handed to vLLM. There is none here: a server behind a real socket stands in and keeps what it is sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

from ift_peft.infer.load import open_parts
from ift_peft.run_dir import RunDir
from ift_peft.serve.settings import Settings
from ift_peft.serve.store.tables import models
from tests.serve.inside import Inside
from tests.serve.tuned import record, train_briefly

pytestmark = pytest.mark.slow
NAME = "ft:tiny:local::vllm0000"
QUESTION = [{"role": "user", "content": "What is 3 plus one?"}]


class Likeness(ThreadingHTTPServer):
    """Answers as vLLM's reference says it does: with the tokens of `text`, one a chunk."""

    def __init__(self, tokens: list[int], texts: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.tokens, self.texts, self.loras, self.broken = tokens, texts, [], False
        self.go_on, self.ended_early = threading.Event(), threading.Event()
        self.go_on.set()

    def handle_error(self, request: Any, address: Any) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    server: Likeness

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        cards = [{"id": "tiny", "max_model_len": 256}, *({"id": name, "parent": "tiny"} for name in self.server.loras)]
        self._send(json.dumps({"object": "list", "data": cards}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, body))
        if self.path == "/v1/load_lora_adapter":
            self.server.loras.append(body["lora_name"])
            self._send(b"Success")
        elif self.path == "/v1/unload_lora_adapter":
            self.server.loras.remove(body["lora_name"])
            self._send(b"Success")
        elif self.server.broken:
            self._send(b'{"error": {"message": "engine dead"}}', 500)
        else:
            self._stream(body)

    def _send(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        pairs = list(zip(self.server.tokens, self.server.texts, strict=True))
        for number, (token, text) in enumerate(pairs):
            last = number == len(pairs) - 1
            choice: dict[str, Any] = {"index": 0, "text": text, "token_ids": [token], "logprobs": None}
            if body["logprobs"] is not None:
                likeliest = {f"token_id:{token}": -0.5, "token_id:7": -1.5}
                choice["logprobs"] = {"token_logprobs": [-0.5], "top_logprobs": [likeliest]}
            choice["finish_reason"] = "stop" if last else None
            try:
                self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
                self.wfile.flush()
            except OSError:
                self.server.ended_early.set()
                raise
            self.server.go_on.wait(30)
        self.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return train_briefly(tmp_path_factory.mktemp("vllm") / "data", "ftjob-vllm")


@pytest.fixture
def likeness(run: RunDir) -> Iterator[Likeness]:
    renderer = open_parts(run).renderer
    tokens = [*renderer.tokenizer("It is 4.")["input_ids"], renderer.end_token_id]
    texts = [renderer.tokenizer.decode([token], skip_special_tokens=True) for token in tokens]
    server = Likeness(tokens, texts)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(run: RunDir, likeness: Likeness) -> Iterator[Inside]:
    url = f"http://127.0.0.1:{likeness.server_address[1]}"
    running = Inside(Settings(data_dir=run.path.parents[2], engine="vllm", vllm_url=url)).start()
    if not running.service.store.every(models.select()):
        record(running.service.store, running.settings.data_dir, run, NAME)
        record(running.service.store, running.settings.data_dir, run, f"{NAME}:ckpt-step-2", step=2)
    yield running
    running.stop()


def test_vllm_is_sent_the_prompt_of_training_and_answers(server: Inside, likeness: Likeness, run: RunDir) -> None:
    client = server.client()
    given: Any = {"model": NAME, "messages": QUESTION, "seed": 5, "stop": ["zzz"], "max_tokens": 20, "top_p": 0.5}
    whole = client.chat.completions.create(logprobs=True, top_logprobs=1, **given)
    assert (whole.model, whole.choices[0].message.content, whole.choices[0].finish_reason) == (NAME, "It is 4.", "stop")
    assert whole.usage is not None and whole.usage.completion_tokens == len(likeness.tokens)
    told = whole.choices[0].logprobs.content
    assert [(one.logprob, len(one.top_logprobs)) for one in told] == [(-0.5, 1)] * (len(likeness.tokens) - 1)
    streamed = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **given)]
    assert "".join(one.delta.content or "" for one in streamed) == "It is 4."
    loads = [body for path, body in likeness.asked if path == "/v1/load_lora_adapter"]
    assert [one["lora_name"] for one in loads] == [NAME]
    exported = Path(loads[0]["lora_path"])
    assert (exported / "adapter_model.safetensors").read_bytes() == (
        run.adapter / "adapter_model.safetensors"
    ).read_bytes()
    parts = open_parts(run)
    (ids,) = parts.renderer.prompts([parts.converse(QUESTION).messages])
    sent = [body for path, body in likeness.asked if path == "/v1/completions"]
    wanted = {"model": NAME, "prompt": ids, "max_tokens": 20, "temperature": 1.0, "top_p": 0.5, "seed": 5}
    for body in sent:
        assert {name: body[name] for name in wanted} == wanted
        assert (body["stop"], body["stop_token_ids"]) == (["zzz"], [parts.renderer.end_token_id])


def test_the_base_is_asked_by_the_name_vllm_has_for_it(server: Inside, likeness: Likeness) -> None:
    done = server.client().chat.completions.create(model="tiny", messages=QUESTION, n=2, max_tokens=4000)
    assert [one.message.content for one in done.choices] == ["It is 4."] * 2
    (first, second) = [body for path, body in likeness.asked if path == "/v1/completions"]
    assert first["model"] == "tiny"
    assert first["max_tokens"] == 256 - len(first["prompt"])
    assert first["seed"] != second["seed"]


def test_vllm_that_fails_is_told_and_one_that_is_gone(server: Inside, likeness: Likeness) -> None:
    client = server.client()
    client.chat.completions.create(model="tiny", messages=QUESTION)
    likeness.broken = True
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model="tiny", messages=QUESTION)
    assert raised.value.code == "engine_error"


def test_a_disconnect_ends_the_request_at_vllm(server: Inside, likeness: Likeness) -> None:
    likeness.tokens, likeness.texts = likeness.tokens * 50, likeness.texts * 50
    client = server.client()
    likeness.go_on.clear()
    stream = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True)
    server.until(lambda: server.service.models.rows()[0] == 1)
    stream.close()
    server.until(lambda: server.service.models.rows()[0] == 0)
    likeness.go_on.set()
    assert likeness.ended_early.wait(30)


def test_checkpoints_are_refused_and_deleted_models_unloaded(server: Inside, likeness: Likeness) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=f"{NAME}:ckpt-step-2", messages=QUESTION)
    assert raised.value.code == "model_not_supported"
    client.chat.completions.create(model=NAME, messages=QUESTION)
    assert likeness.loras == [NAME]
    client.models.delete(NAME)
    assert likeness.loras == []
    assert not list((server.settings.data_dir / "cache" / "vllm").iterdir())
