"""The recipe's sections of several adapters on one base: the stages of a `pipeline`, the parents of `merging`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from ift_peft.sections import Count, GenerationMetric, Section

HOLE = re.compile(r"\{([^{}]+)\}")
AT_ONCE = "at_once"
TOGETHER = "together"
OF_ALL = ("name", "base", "pipeline", "merging", "tune", "extends")
"""What a stage or a parent cannot have of its own."""


def _or_nothing(value: Any) -> Any:
    return {} if value is None else value


Part = Annotated[dict[str, Any], BeforeValidator(_or_nothing)]
"""What of the recipe's other sections is different in a stage or a parent, in their form."""
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Method = Literal["linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
PRUNING: tuple[Method, ...] = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
Kind = Literal["mean_logits", "mean_probs", "vote"]


class Pipeline(Section):
    """A graph of stages over one base. A stage's `data.columns.text` names the request's fields and earlier stages."""

    stages: dict[Name, Part]
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
        faults += _of_all({**self.stages, AT_ONCE: self.at_once or {}})
        if not set(holes(self.document)) & set(self.stages):
            faults.append("the answer of a stage in document, as {" + next(iter(self.stages), "name") + "}")
        if "pass_at_k" in self.metrics or not self.metrics:
            faults.append("metrics, other than pass_at_k")
        if faults:
            raise ValueError(f"a section with {'; '.join(faults)}")
        return self


class Combining(Section):
    """One way to make the parents' adapters into one (docs/combine.md); what is not set is as `ift combine` has it."""

    method: Method
    weights: tuple[float, ...] | None = None
    density: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    rank: Count | None = None
    search: Count | None = None
    """Choose weights and density by this many trials."""

    @model_validator(mode="after")
    def _takes_them(self) -> Self:
        if self.density is not None and self.method not in PRUNING:
            raise ValueError(f"a way without density, which only {', '.join(PRUNING)} have")
        if self.rank is not None and self.method == "linear":
            raise ValueError("linear without rank, which is exact at the sum of the ranks; svd takes one")
        return self

    @property
    def called(self) -> str:
        """What its scores are told under."""
        given = [] if self.weights is None else [" ".join(f"{weight:g}" for weight in self.weights)]
        given += [f"{name} {value:g}" for name, value in self if name in ("density", "rank") and value is not None]
        return ", ".join([self.method, *given, *(["searched"] if self.search else [])])


class Merging(Section):
    """Adapters of several domains on one base, combined, and measured on every domain beside what else there is."""

    parents: dict[Name, Part]
    """The domains by name: of each, what of its recipe is different."""
    combine: tuple[Combining, ...] = tuple(Combining(method=method) for method in get_args(Method))
    ensembles: tuple[Kind, ...] = get_args(Kind)
    """Ensembles of the parents, on domains with labels."""
    together: Part | None = Field(default_factory=dict)
    """One more adapter, trained on the rows of all domains; what of its recipe is not as the parents have it alike."""

    @model_validator(mode="after")
    def _holds_parents(self) -> Self:
        faults = []
        if len(self.parents) < 2:
            faults.append("at least two parents")
        if TOGETHER in self.parents:
            faults.append(f"no parent that is called {TOGETHER}")
        faults += _of_all({**self.parents, TOGETHER: self.together or {}})
        names = [one.called for one in self.combine]
        faults += [f"no parent that is called {name}" for name in self.parents if name in ("base", *names)]
        if self.together is not None and "data" in self.together:
            faults.append(f"no data in {TOGETHER}: its rows are those of the parents")
        faults += [f"{name} once in combine" for name in dict.fromkeys(names) if names.count(name) > 1]
        faults += [
            f"a weight for each of {len(self.parents)} parents in {one.called}"
            for one in self.combine
            if one.weights is not None and len(one.weights) != len(self.parents)
        ]
        if faults:
            raise ValueError(f"a section with {'; '.join(faults)}")
        return self


def _of_all(parts: Mapping[str, dict[str, Any]]) -> list[str]:
    return [f"no {key} in {name}: it is that of all" for name, part in parts.items() for key in OF_ALL if key in part]


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
