"""Every method and parameter of the OpenAI client for what we offer, and the table of them in docs/openai.md."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, OpenAI
from openai.pagination import SyncCursorPage
from openai.resources.chat.completions.completions import Completions as ChatCompletions
from openai.resources.chat.completions.messages import Messages
from openai.resources.completions import Completions
from openai.resources.files import Files
from openai.resources.fine_tuning.alpha.graders import Graders
from openai.resources.fine_tuning.checkpoints.permissions import Permissions
from openai.resources.fine_tuning.jobs.checkpoints import Checkpoints
from openai.resources.fine_tuning.jobs.jobs import Jobs
from openai.resources.models import Models
from openai.types import Completion, FileDeleted, FileObject, Model, ModelDeleted
from openai.types import completion_create_params as text_params
from openai.types.chat import ChatCompletion
from openai.types.chat import completion_create_params as chat_params
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent, job_create_params
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from tests.serve.conftest import Server
from tests.serve.walk import FEW, Walk, rows, walk

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "openai.md"
BEGIN, END = "<!-- written by tests/serve/test_conformance.py: begin -->\n", "<!-- end -->\n"
RESOURCES = {
    "files": Files,
    "fine_tuning.jobs": Jobs,
    "fine_tuning.jobs.checkpoints": Checkpoints,
    "fine_tuning.checkpoints.permissions": Permissions,
    "fine_tuning.alpha.graders": Graders,
    "models": Models,
    "chat.completions": ChatCompletions,
    "chat.completions.messages": Messages,
    "completions": Completions,
}
OBJECTS: dict[str, Any] = {
    "file": FileObject,
    "fine_tuning.job": FineTuningJob,
    "fine_tuning.job.event": FineTuningJobEvent,
    "fine_tuning.job.checkpoint": FineTuningJobCheckpoint,
    "model": Model,
    "chat.completion": ChatCompletion,
    "text_completion": Completion,
}
HELPERS = ("parse", "stream", "retrieve_content")  # of the client: they send what `create` and `content` send

# A value for each parameter of the three methods that take many, and that a minimal request is sent with.
CHAT: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "frequency_penalty": 0.5,
    "function_call": "none",
    "functions": [{"name": "f", "parameters": {}}],
    "logit_bias": {"5": 1},
    "logprobs": True,
    "max_completion_tokens": 3,
    "max_tokens": 3,
    "metadata": {"a": "b"},
    "modalities": ["text"],
    "moderation": {"model": "omni-moderation-latest"},
    "n": 2,
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "a"},
    "presence_penalty": 0.5,
    "prompt_cache_key": "a",
    "prompt_cache_options": {},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": {"type": "json_object"},
    "safety_identifier": "a",
    "seed": 1,
    "service_tier": "auto",
    "stop": ["x"],
    "store": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "tool_choice": "none",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "top_logprobs": 2,
    "top_p": 0.5,
    "user": "a",
    "verbosity": "low",
    "web_search_options": {},
}
TEXT: dict[str, Any] = {
    "best_of": 2,
    "echo": True,
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1},
    "logprobs": 1,
    "max_tokens": 3,
    "n": 2,
    "presence_penalty": 0.5,
    "seed": 1,
    "stop": "x",
    "stream_options": {"include_usage": True},
    "suffix": "a",
    "temperature": 0.5,
    "top_p": 0.5,
    "user": "a",
}
JOB: dict[str, Any] = {
    "hyperparameters": {"n_epochs": 1},
    "integrations": [{"type": "wandb", "wandb": {"project": "a"}}],
    "metadata": {"a": "b"},
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
    "method (dpo)": {"type": "dpo", "dpo": {}},
    "method (reinforcement)": {"type": "reinforcement", "reinforcement": {"grader": {}}},
    "seed": 1,
    "suffix": "a",
    "validation_file": "file",
}
ALONGSIDE = {"top_logprobs": {"logprobs": True}, "best_of": {"n": 1}, "stream_options": {"stream": True}}


@pytest.fixture(scope="module")
def walked(server: Server) -> Walk:
    return walk(server)


@pytest.mark.slow
def test_the_walk_calls_every_method_of_the_client(walked: Walk) -> None:
    every = {
        f"{prefix}.{name}"
        for prefix, resource in RESOURCES.items()
        for name, member in vars(resource).items()
        if inspect.isfunction(member) and not name.startswith(("_", "with_")) and name not in HELPERS
    }
    assert every == set(walked.offered) | set(walked.refused)


@pytest.mark.slow
def test_every_object_has_the_fields_that_the_client_declares(walked: Walk) -> None:
    seen = set()
    for method, path, _, body in walked.answers:
        for one in _objects(body):
            kind = str(one["object"])
            model = {"file": FileDeleted, "model": ModelDeleted}[kind] if "deleted" in one else OBJECTS[kind]
            checked = one
            if one.get("status") == "paused":  # the one value that we answer with and the client does not declare
                checked = {**one, "status": "running"}
            model.model_validate(checked, strict=True)
            unknown = set(one) - set(model.model_fields)
            assert not unknown, (method, path, unknown)
            missing = set(model.model_fields) - set(one) - {"shutdown_date", "moderation"}
            assert kind in ("chat.completion", "text_completion") or not missing, (method, path, missing)
            seen.add(kind)
    assert seen == set(OBJECTS)


@pytest.mark.slow
def test_every_list_is_paged_as_the_client_expects(server: Server, walked: Walk) -> None:
    lists = [body for _, _, _, body in walked.answers if isinstance(body, dict) and body.get("object") == "list"]
    assert lists
    for body in lists:
        SyncCursorPage[Any].model_validate(body)
        assert isinstance(body["has_more"], bool)
    client = server.client()
    whole = [one.id for one in client.fine_tuning.jobs.list(limit=100)]
    assert len(whole) >= 2
    assert [one.id for one in client.fine_tuning.jobs.list(limit=1)] == whole  # the client asks for page after page


@pytest.mark.slow
def test_every_error_is_one_that_the_client_reads(walked: Walk) -> None:
    errors = [body for _, _, status, body in walked.answers if status >= 400]
    assert errors
    assert all(set(body["error"]) == {"message", "type", "param", "code"} for body in errors)


@pytest.fixture(scope="module")
def parameters(server: Server, walked: Walk) -> dict[str, dict[str, str]]:
    """For each method with many parameters, what becomes of each of them."""
    client = server.client()
    file = client.files.create(file=("a.jsonl", rows(10)), purpose="fine-tune").id

    def chat(**given: Any) -> Any:
        few = {} if "max_completion_tokens" in given else {"max_tokens": 1}
        messages = [{"role": "user", "content": "好"}]
        return client.chat.completions.create(model="tiny", messages=messages, **{**few, **given})

    def text(**given: Any) -> Any:
        return client.completions.create(model="tiny", prompt="好", **{"max_tokens": 1, **given})

    def job(**given: Any) -> None:
        if "validation_file" in given:
            given["validation_file"] = file
        made = client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body={"recipe": FEW}, **given)
        client.fine_tuning.jobs.cancel(made.id)

    return {
        "chat.completions.create": {name: _outcome(chat, name, value) for name, value in CHAT.items()},
        "completions.create": {name: _outcome(text, name, value) for name, value in TEXT.items()},
        "fine_tuning.jobs.create": {name: _outcome(job, name, value) for name, value in JOB.items()},
    }


def _outcome(create: Any, name: str, value: Any) -> str:
    try:
        answer = create(**{name.partition(" ")[0]: value}, **ALONGSIDE.get(name, {}))
        if name == "stream_options":
            list(answer)
    except APIStatusError as error:
        refused = error
    else:
        return "yes"
    assert refused.status_code == 400, (name, refused)
    assert refused.code in ("unsupported_parameter", "unknown_parameter"), (name, refused.body)
    assert name.partition(" ")[0] in str(refused.body), (name, refused.body)
    return "refused"


@pytest.mark.slow
def test_every_parameter_that_the_client_knows_is_tried(parameters: dict[str, dict[str, str]]) -> None:
    chat = set(chat_params.CompletionCreateParamsBase.__annotations__) - {"messages", "model"}
    text = set(text_params.CompletionCreateParamsBase.__annotations__) - {"prompt", "model"}
    job = set(job_create_params.JobCreateParams.__annotations__) - {"training_file", "model"}
    assert set(parameters["chat.completions.create"]) == chat
    assert set(parameters["completions.create"]) == text
    assert {name.partition(" ")[0] for name in parameters["fine_tuning.jobs.create"]} == job


@pytest.mark.slow
def test_a_parameter_that_nobody_knows_is_refused(server: Server) -> None:
    client = server.client()
    with pytest.raises(APIStatusError, match="temperatur") as refused:
        client.completions.create(model="tiny", prompt="好", extra_body={"temperatur": 0})
    assert (refused.value.status_code, refused.value.code) == (400, "unknown_parameter")


@pytest.mark.slow
def test_the_table_of_the_documentation_is_what_was_observed(
    walked: Walk, parameters: dict[str, dict[str, str]]
) -> None:
    text = DOCUMENT.read_text("utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    written = before + BEGIN + "".join(_table(walked, parameters)) + END + after
    if os.environ.get("IFT_WRITE_DOCS"):
        DOCUMENT.write_text(written, "utf-8")
        text = written
    assert text == written, "run this test with IFT_WRITE_DOCS=1"


def _table(walked: Walk, parameters: dict[str, dict[str, str]]) -> Iterator[str]:
    yield "| `client.` | request | |\n|---|---|---|\n"
    for name, request in sorted(walked.offered.items()):
        yield f"| `{name}` | `{request}` | yes |\n"
    for name, request in sorted(walked.refused.items()):
        yield f"| `{name}` | `{request}` | no: 404 |\n"
    for name, found in parameters.items():
        taken = [f"`{one}`" for one, outcome in found.items() if outcome == "yes"]
        refused = [f"`{one}`" for one, outcome in found.items() if outcome == "refused"]
        yield f"\n`{name}` takes {', '.join(taken)}. It refuses, with 400: {', '.join(refused)}.\n"


def _objects(body: Any) -> Iterator[dict[str, Any]]:
    if isinstance(body, dict) and body.get("object") == "list":
        yield from body["data"]
    elif isinstance(body, dict) and "object" in body:
        yield body


def test_the_client_is_the_pinned_one() -> None:
    constraints = (DOCUMENT.parent.parent / "constraints.txt").read_text("utf-8")
    import openai

    assert f"openai=={openai.__version__}\n" in constraints
    assert OpenAI.__module__.startswith("openai")
