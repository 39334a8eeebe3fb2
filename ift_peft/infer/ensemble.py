"""Several runs that answer together with labels: their probabilities made into one set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ift_peft.adapter_methods import RANKED
from ift_peft.errors import RunError, raise_all
from ift_peft.infer.load import Parts, Question, load_members
from ift_peft.infer.predict import Answer, answer_all
from ift_peft.stages import Kind

Floats = NDArray[np.float64]
TIES = 1e-9  # weight of the mean probabilities in a vote: it decides ties and nothing else


def together(probabilities: Floats, kind: Kind) -> Floats:
    """One set of probabilities, shape (rows, labels), of those of several members, shape (members, rows, labels).

    `mean_logits` is the geometric mean, normalised: the softmax of the members' mean logits, or log-likelihoods, since
    what each adds to all labels alike cancels. `mean_probs` is the arithmetic mean. `vote` is the share of members
    whose likeliest label it is; between labels with equally many votes `mean_probs` decides.
    """
    if kind == "mean_logits":
        logs = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny)).mean(axis=0)
        powers = np.exp(logs - logs.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
    mean = probabilities.mean(axis=0)
    if kind == "mean_probs":
        return np.asarray(mean)
    votes = np.eye(probabilities.shape[-1])[probabilities.argmax(axis=-1)].mean(axis=0)
    return np.asarray((votes + TIES * mean) / (1 + TIES))


@dataclass(frozen=True)
class Member:
    """A run, and the model that its adapter, `adapter`, is one of."""

    parts: Parts
    model: Any
    adapter: str

    def activate(self) -> Any:
        """The model with this member's adapter on."""
        self.model.set_adapter(self.adapter, inference_mode=True)
        return self.model


def check_members(members: Sequence[Parts]) -> tuple[str, ...]:
    """The labels of all, in the order of the first. Raises `RunError` or `Faults` where they are not the same."""
    faults = [
        RunError(
            expected="runs that answer with labels",
            found=f"{parts.run.path.parent.name}, a mix of tasks" if parts.recipe.data.mixed else _called(parts),
            fix="name one of its tasks: --source" if parts.recipe.data.mixed else "leave it out",
        )
        for parts in members
        if not parts.labels
    ]
    if len(members) < 2:
        faults.append(RunError(expected="at least two runs", found=str(len(members)), fix="name more (ift runs)"))
    raise_all(faults)
    labels = members[0].labels
    raise_all(
        [
            RunError(
                expected=f"the labels of {_called(members[0])} in every run: {', '.join(labels)}",
                found=f"{', '.join(parts.labels)} in {_called(parts)}",
                fix="leave it out, or train it with the same words: a mapping in data.labels renames stored ones",
            )
            for parts in members[1:]
            if set(parts.labels) != set(labels)
        ]
    )
    return labels


def _called(parts: Parts) -> str:
    return "/".join(parts.run.path.parts[-2:])


def open_members(members: Sequence[Parts]) -> tuple[list[Member], list[str]]:
    """The runs ready to answer, and notes on loading; LoRA adapters of one base share it, held in memory once."""
    groups: dict[Any, list[int]] = {}
    for number, parts in enumerate(members):
        recipe = parts.recipe
        width = len(recipe.data.label_words) if recipe.base.head == "sequence-classification" else 0
        section = recipe.base.model_copy(update={"model": parts.location.fingerprint(), "revision": None})
        # PEFT lays adapters of one kind over a base, and of the kinds that are not LoRA's only with itself
        apart = None if recipe.adapter.method in RANKED else number
        groups.setdefault((section.model_dump_json(), width, apart), []).append(number)
    opened: dict[int, Member] = {}
    notes: list[str] = []
    for numbers in groups.values():
        model, names, told = load_members([members[number] for number in numbers])
        notes += [note for note in told if note not in notes]
        opened |= {number: Member(members[number], model, name) for number, name in zip(numbers, names, strict=True)}
    return [opened[number] for number in range(len(members))], notes


def answer_together(
    members: Sequence[Member], questions: Sequence[Sequence[Question]], *, labels: Sequence[str], kind: Kind
) -> Iterator[Answer]:
    """The answer of all to each question; `questions` has, for each member, each as that member is asked.

    A question is truncated where it was for any of them.
    """
    answers = [
        list(answer_all(member.activate(), member.parts, own, max_new_tokens=1))
        for member, own in zip(members, questions, strict=True)
    ]
    if not answers[0]:
        return
    table = np.array([[[(one.probabilities or {})[label] for label in labels] for one in own] for own in answers])
    for number, row in enumerate(together(table, kind)):
        named = dict(zip(labels, map(float, row), strict=True))
        truncated = any(own[number].truncated for own in answers)
        yield Answer(labels[int(row.argmax())], named, truncated)
