"""The body of a request for a job, as OpenAI's client sends it, and what of it is not done here."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from ift_peft.serve.errors import ApiError
from ift_peft.serve.objects import MOST_PAIRS, Hyperparameters, Object, Supervised, few_pairs

NO_NUL = r"^[^\x00]*$"  # which databases do not keep
Key = Annotated[str, StringConstraints(max_length=64, pattern=NO_NUL)]
Value = Annotated[str, StringConstraints(max_length=512, pattern=NO_NUL)]
Pairs = Annotated[dict[Key, Value], Field(max_length=MOST_PAIRS)]
Id = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class MethodBody(Object):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


class CreateJob(Object):
    model: Id
    training_file: Id
    validation_file: Id | None = None
    hyperparameters: Hyperparameters | None = None
    """As `method.supervised.hyperparameters`; OpenAI's older form."""
    method: MethodBody | None = None
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1, strict=True)] | None = None
    metadata: Annotated[Pairs | None, BeforeValidator(few_pairs)] = None
    integrations: list[Any] | None = None
    priority: Annotated[int, Field(ge=-100, le=100, strict=True)] = 0
    """Ours, through `extra_body`: of the jobs that wait, the one with the smallest begins first."""
    recipe: dict[str, Any] | None = None
    """Ours, through `extra_body`: sections of a recipe, laid over the one that the job makes."""


def hyperparameters_of(body: CreateJob) -> Hyperparameters:
    """Those asked for, in either form. Raises `ApiError` for a method that is not done, and for two that differ."""
    method = body.method
    if body.integrations:
        raise _unsupported("integrations", "integrations are not supported: nothing leaves this machine")
    if method is not None:
        for name in ("dpo", "reinforcement"):
            if method.type == name or getattr(method, name) is not None:
                raise _unsupported("method", f"method {name!r} is not supported; 'supervised' is")
    new = None if method is None or method.supervised is None else method.supervised.hyperparameters
    old = body.hyperparameters
    if new is not None and old is not None and new != old:
        raise ApiError(
            400,
            "hyperparameters and method.supervised.hyperparameters differ; give one of them",
            code="invalid_value",
            param="hyperparameters",
        )
    return new or old or Hyperparameters()


def suffix_of(body: CreateJob) -> str:
    """The suffix as it stands in a model's name: in small letters, with hyphens for spaces and underscores.

    Raises `ApiError` where it holds anything else, as two suffixes would become one by leaving that out, and where it
    holds no letter and no digit.
    """
    if body.suffix is None:
        return ""
    other = "".join(dict.fromkeys(re.findall(r"[^a-zA-Z0-9 _-]", body.suffix)))
    cleaned = re.sub(r"[ _-]+", "-", body.suffix.lower()).strip("-")
    if other or not cleaned:
        found = f"found {other!r}" if other else "found no letter and no digit"
        raise ApiError(400, f"suffix: letters a to z, digits and -; {found}", code="invalid_value", param="suffix")
    return cleaned


def _unsupported(param: str, message: str) -> ApiError:
    return ApiError(400, message, code="unsupported_parameter", param=param)
