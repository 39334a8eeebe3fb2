"""The whole API asked through the unmodified OpenAI client, with every answer kept as it came over the wire."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
from openai import APIStatusError, DefaultHttpxClient, OpenAI

from tests.serve.conftest import OPEN, Server

FEW: dict[str, Any] = {  # a training of seconds
    "training": {"max_steps": 4},
    "evaluation": {"forgetting": False},
}
Answer = tuple[str, str, int, Any]  # method, path, status, body


def rows(count: int, *, offset: int = 0) -> bytes:
    """Chats, as JSONL: invented reviews with one word as the answer."""
    lines = []
    for number in range(offset, offset + count):
        good = number % 2 == 0
        text = f"第{number}次购买，{'很满意' if good else '太失望了'}。"
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "正面" if good else "负面"}]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode()


@dataclass
class Walk:
    """What was asked and answered, and which of the client's methods were offered or refused."""

    server: Server
    answers: list[Answer] = field(default_factory=list)
    offered: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hooks = {"response": [self._keep]}
        self.client = OpenAI(
            base_url=f"{self.server.url}/v1",
            api_key="none",
            max_retries=0,
            http_client=DefaultHttpxClient(event_hooks=hooks, timeout=120),
        )
        OPEN.append(self.client)

    def _keep(self, response: Any) -> None:
        body: Any = None
        if response.headers.get("content-type", "").startswith("application/json"):
            response.read()
            body = response.json()
        request = response.request
        self.answers.append((request.method, request.url.path, response.status_code, body))

    def call(self, name: str, **arguments: Any) -> Any:
        """One method of the client, as `files.create`; it must succeed."""
        method: Any = self.client
        for part in name.split("."):
            method = getattr(method, part)
        before = len(self.answers)
        answer = method(**arguments)
        verb, path, _, _ = self.answers[before]
        self.offered.setdefault(name, f"{verb} {_template(path)}")
        return answer

    def refuse(self, name: str, **arguments: Any) -> None:
        """One that is not offered: the client must be told so in its own form."""
        method: Any = self.client
        for part in name.split("."):
            method = getattr(method, part)
        before = len(self.answers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the client's, of a method that it still has
            with pytest.raises(APIStatusError) as refused:
                method(**arguments)
        assert refused.value.status_code in (404, 405), (name, refused.value)
        assert refused.value.code in ("unknown_url", "method_not_allowed"), (name, refused.value.body)
        verb, path, _, _ = self.answers[before]
        self.refused[name] = f"{verb} {_template(path)}"

    def until(self, job: str, *statuses: str, seconds: float = 300) -> Any:
        """The job once it has one of these statuses."""
        for _ in range(int(seconds / 0.3)):
            found = self.call("fine_tuning.jobs.retrieve", fine_tuning_job_id=job)
            if found.status in statuses:
                return found
            assert found.status != "failed", found.error
            time.sleep(0.3)
        raise AssertionError(f"{job} is {found.status} after {seconds} s")


def _template(path: str) -> str:
    """The path with a name in the place of each id."""
    names = {
        "files": "file_id",
        "jobs": "fine_tuning_job_id",
        "models": "model",
        "checkpoints": "checkpoint",
        "completions": "completion_id",
    }
    parts = path.removeprefix("/v1").strip("/").split("/")
    found = []
    for number, part in enumerate(parts):
        before = parts[number - 1] if number else ""
        fixed = part in ("jobs", "files", "models", "checkpoints", "events", "content", "pause", "permissions")
        found.append(f"{{{names[before]}}}" if before in names and not fixed else part)
    return "/" + "/".join(found)


def walk(server: Server) -> Walk:
    """Upload, train with pause and resume, chat, cancel, delete: every method for files, jobs and models."""
    found = Walk(server)
    call = found.call
    training = call("files.create", file=("train.jsonl", rows(12)), purpose="fine-tune")
    held_out = call(
        "files.create",
        file=("held_out.jsonl", rows(10, offset=100)),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    call("files.list", purpose="fine-tune", limit=10, order="asc")
    call("files.retrieve", file_id=training.id)
    assert call("files.content", file_id=training.id).read() == rows(12)
    call("files.wait_for_processing", id=training.id)
    longer = {**FEW, "training": {**FEW["training"], "max_steps": 40}}
    job = call(
        "fine_tuning.jobs.create",
        model="tiny",
        training_file=training.id,
        validation_file=held_out.id,
        suffix="reviews",
        seed=3,
        metadata={"team": "support"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": "auto"}},
        },
        extra_body={"recipe": longer},
    )
    call("fine_tuning.jobs.list", limit=5, metadata={"team": "support"})
    found.until(job.id, "running")
    call("fine_tuning.jobs.pause", fine_tuning_job_id=job.id)
    found.until(job.id, "paused")
    call("fine_tuning.jobs.resume", fine_tuning_job_id=job.id)
    other = call("fine_tuning.jobs.create", model="tiny", training_file=training.id, extra_body={"recipe": FEW})
    call("fine_tuning.jobs.cancel", fine_tuning_job_id=other.id)
    found.until(other.id, "cancelled")
    job = found.until(job.id, "succeeded")
    call("fine_tuning.jobs.list_events", fine_tuning_job_id=job.id, limit=50)
    checkpoints = call("fine_tuning.jobs.checkpoints.list", fine_tuning_job_id=job.id).data
    call("files.retrieve", file_id=job.result_files[0])
    assert b"train_loss" in call("files.content", file_id=job.result_files[0]).read()
    call("models.list")
    call("models.retrieve", model=job.fine_tuned_model)
    for model in (job.fine_tuned_model, checkpoints[0].fine_tuned_model_checkpoint, "tiny"):
        _ask(found, model)
    _not_offered(found, job)
    call("models.delete", model=job.fine_tuned_model)
    for file in (training, held_out):
        call("files.delete", file_id=file.id)
    return found


def _ask(found: Walk, model: str) -> None:
    messages = [{"role": "user", "content": "第7次购买，很满意。"}]
    common: dict[str, Any] = {"model": model, "max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = found.call("chat.completions.create", messages=messages, n=2, **common)
    stream = found.call(
        "chat.completions.create", messages=messages, stream=True, stream_options={"include_usage": True}, **common
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content == whole.choices[1].message.content
    found.call("completions.create", model=model, prompt="第7次", max_tokens=4, temperature=0, logprobs=2)


def _not_offered(found: Walk, job: Any) -> None:
    name = job.fine_tuned_model
    permissions = "fine_tuning.checkpoints.permissions"
    found.refuse(f"{permissions}.list", fine_tuned_model_checkpoint=name)
    found.refuse(f"{permissions}.create", fine_tuned_model_checkpoint=name, project_ids=["one"])
    found.refuse(f"{permissions}.retrieve", fine_tuned_model_checkpoint=name)
    found.refuse(f"{permissions}.delete", fine_tuned_model_checkpoint=name, permission_id="one")
    grader: dict[str, Any] = {
        "type": "string_check", "name": "g", "input": "{{sample.output_text}}", "reference": "a", "operation": "eq"
    }  # fmt: skip
    found.refuse("fine_tuning.alpha.graders.run", grader=grader, model_sample="a")
    found.refuse("fine_tuning.alpha.graders.validate", grader=grader)
    found.refuse("chat.completions.list")
    found.refuse("chat.completions.retrieve", completion_id="chatcmpl-1")
    found.refuse("chat.completions.update", completion_id="chatcmpl-1", metadata={})
    found.refuse("chat.completions.delete", completion_id="chatcmpl-1")
    found.refuse("chat.completions.messages.list", completion_id="chatcmpl-1")
