"""The objects that the API answers with, field by field as OpenAI's reference has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MOST_NAMES = 128  # of an object that is sent: more than there are parameters
MOST_PAIRS = 16  # of metadata, as OpenAI has it
Auto = Literal["auto"]
Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
FINAL: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
MOST_MULTIPLIER = 1000
Purpose = Literal["fine-tune", "fine-tune-results"]


def few_names(value: Any, most: int = MOST_NAMES) -> Any:
    """Each unknown name is a fault of its own, and a body has room for a million: so before they are looked at."""
    if isinstance(value, dict) and len(value) > most:
        raise PydanticCustomError("too_long", "Input should have at most {most} names", {"most": most})
    return value


def few_pairs(value: Any) -> Any:
    return few_names(value, MOST_PAIRS)


class Object(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _of_few_names(cls, value: Any) -> Any:
        return few_names(value)


class ErrorInfo(Object):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Object):
    """What everything that goes wrong is answered with."""

    error: ErrorInfo


T = TypeVar("T", bound=Object)


class Page(Object, Generic[T]):
    """One page of a list; `after` with the id of the last of `data` asks for the next one."""

    object: Literal["list"] = "list"
    data: Sequence[T]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class File(Object):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: Purpose
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None


class FileDeleted(Object):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class Model(Object):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelDeleted(Object):
    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


class Hyperparameters(Object):
    n_epochs: Auto | Annotated[int, Field(ge=1, le=50, strict=True)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256, strict=True)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=MOST_MULTIPLIER)] = "auto"


class Supervised(Object):
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Object):
    type: Literal["supervised"]
    supervised: Supervised = Supervised()


class JobError(Object):
    code: str
    message: str
    param: str | None = None


class Job(Object):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: Status
    hyperparameters: Hyperparameters
    method: Method
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobError | None
    seed: int
    integrations: list[Any] = []
    metadata: dict[str, str] | None


class JobEvent(Object):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None = None


class CheckpointMetrics(Object):
    step: float
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class JobCheckpoint(Object):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int


def page_of(data: Sequence[T], has_more: bool) -> Page[T]:
    """A page of objects that have an `id`."""
    ids = [str(getattr(one, "id", "")) for one in data]
    return Page(data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=has_more)
