"""The recipe's sections that choose among adapters: `validation` within a training, `tune` among trainings."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from ift_peft.sections import Count, Fraction, Section

ValidationMetric = Literal["accuracy", "f1", "loss"]


class Validation(Section):
    """Training rows set aside to choose by. The held-out rows are measured once, at the end, and choose nothing."""

    size: Fraction | Count = 0.1
    """Share or number of the training rows: of each label and source alike, equal prompts on one side."""
    seed: int = 0
    every: Literal["epoch"] | Count = "epoch"
    """Measure, and write a checkpoint, after each epoch or after this many steps; always after the last step."""
    metric: ValidationMetric | None = None
    """What the best checkpoint is best by. Default: accuracy where there are labels, else loss. `loss` is in nats: per
    token of the answers, or per row of the true class among the probabilities of the classes."""
    patience: Count | None = None
    """Stop after this many measurements in a row that are no better than the best before; None: never early."""
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """What a measurement must be better by to count as better for `patience`; the best checkpoint is best by any."""

    def chosen_metric(self, *, labels: bool) -> ValidationMetric:
        """The metric that decides, for a task with or without labels."""
        return self.metric or ("accuracy" if labels else "loss")


def _flag(value: Any) -> Any:
    """`{low: 1, high: 6, int}` in YAML gives `int` the value null: named is meant."""
    return True if value is None else value


class Span(Section):
    """Numbers from `low` to `high`, both included."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    low: float
    high: float
    log: Annotated[bool, BeforeValidator(_flag)] = False
    """Draw evenly on the scale of logarithms."""
    integer: Annotated[bool, BeforeValidator(_flag), Field(alias="int")] = False
    """Whole numbers only."""

    @model_validator(mode="after")
    def _is_a_span(self) -> Self:
        faults = []
        if self.low >= self.high:
            faults.append("low less than high")
        if self.log and self.low <= 0:
            faults.append("low above 0 where log is set")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            faults.append("whole numbers where int is set")
        if faults:
            raise ValueError("; ".join(faults))
        return self


def _as_setting(value: Any) -> Any:
    """Raises `ValueError` for what is neither a span nor a list to choose from."""
    if not isinstance(value, dict | Span) and not (isinstance(value, list | tuple) and len(value) > 1):
        raise ValueError("a span such as {low: 1e-5, high: 1e-2, log: true}, or a list of at least two values")
    return value


Choices = tuple[bool | int | float | str | None, ...]
Setting = Annotated[Span | Choices, BeforeValidator(_as_setting)]


class Tune(Section):
    """What `ift tune` searches, and for how long. `ift train` takes no notice of it."""

    search: dict[str, Setting] = Field(default_factory=dict)
    """Settings by their dotted path: a span, or a list of values. Empty: learning rate, r of the adapter, epochs."""
    trials: Count | None = None
    """End after this many trainings. Without any limit: 20."""
    minutes: Annotated[float, Field(gt=0.0)] | None = None
    """End after this much time at work, over all sessions, with what measuring at the end will take held back."""
    tokens: Count | None = None
    """End after this many tokens trained on, prompts included."""
    prune: bool = True
    """Stop a trial whose best so far is worse than the median of the others after as many measurements."""
    continue_best: bool = True
    """From half of the limit on, train on from the best checkpoint as long as the best trial was still improving."""
    seed: int = 0

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set; `trials: 20` where none is."""
        found = {name: getattr(self, name) for name in ("trials", "minutes", "tokens")}
        return {name: value for name, value in found.items() if value is not None} or {"trials": 20}
