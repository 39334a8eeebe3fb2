"""The recipe's section `pipeline`: stages with an adapter each, whose answers go into the prompts of later ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from ift_peft.sections import GenerationMetric, Section

HOLE = re.compile(r"\{([^{}]+)\}")
AT_ONCE = "at_once"
OF_ALL = ("name", "base", "pipeline", "tune", "extends")
"""What a stage cannot have of its own."""


def _or_nothing(value: Any) -> Any:
    return {} if value is None else value


Part = Annotated[dict[str, Any], BeforeValidator(_or_nothing)]
"""What of the recipe's other sections is different in a stage, in their form."""


class Pipeline(Section):
    """A graph of stages over one base. A stage's `data.columns.text` names the request's fields and earlier stages."""

    stages: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Part]
    """Of each stage by its name, which is also the column that its answers are learnt from."""
    document: str
    """What a request comes to: answers of stages, and fields of the request, in braces."""
    at_once: Part | None = None
    """One more adapter, which answers the request with the whole document: what the stages are measured against."""
    metrics: tuple[GenerationMetric, ...] = ("chrf", "rouge")
    """Of the documents, and of the answers of stages that have neither labels nor metrics."""

    @model_validator(mode="after")
    def _holds_stages(self) -> Self:
        faults = []
        if len(self.stages) < 2:
            faults.append("at least two stages")
        if AT_ONCE in self.stages:
            faults.append(f"no stage that is called {AT_ONCE}")
        for name, part in {**self.stages, AT_ONCE: self.at_once or {}}.items():
            faults += [f"no {key} in {name}: it is that of all stages" for key in OF_ALL if key in part]
        if not set(holes(self.document)) & set(self.stages):
            faults.append("the answer of a stage in document, as {" + next(iter(self.stages), "name") + "}")
        if "pass_at_k" in self.metrics:
            faults.append("metrics other than pass_at_k")
        if faults:
            raise ValueError(f"a section with {'; '.join(faults)}")
        return self


def holes(template: str) -> tuple[str, ...]:
    """The names in braces, each once; of a template without any, itself: the name of a column."""
    return tuple(dict.fromkeys(HOLE.findall(template))) or (template,)


def in_order(texts: Mapping[str, str]) -> list[str]:
    """The stages, each after those whose answers it takes; `texts` has the template of each.

    Raises `ValueError` where stages wait for each other.
    """
    graph = {name: [hole for hole in holes(text) if hole in texts] for name, text in texts.items()}
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise ValueError(f"stages that do not wait for each other: {' → '.join(reversed(error.args[1]))}") from None


def fields_of(texts: Iterable[str], stages: Iterable[str]) -> tuple[str, ...]:
    """What the templates `texts` take that is no stage's answer: the fields of a request."""
    known = set(stages)
    return tuple(dict.fromkeys(hole for text in texts for hole in holes(text) if hole not in known))
