"""Bodies that are wrong a hundred thousand times over: each is refused for one fault."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from ift_peft.serve.inference.bodies import ChatBody, CompletionBody
from ift_peft.serve.jobs.body import CreateJob

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
