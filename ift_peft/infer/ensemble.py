"""Several runs that answer together with labels: their probabilities made into one set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ift_peft.adapter_methods import RANKED
from ift_peft.data.row import Message
from ift_peft.errors import RunError, raise_all
from ift_peft.infer.likelihood import label_probabilities
from ift_peft.infer.load import Parts, Question, stack_members
from ift_peft.infer.predict import Answer
from ift_peft.infer.stacked import StackedAdapters
from ift_peft.stages import Kind

Floats = NDArray[np.float64]
BATCH = 32  # rows: prompts times the members that share a base
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
    """A run, and the model that its adapter, `adapter`, is one of, on a `stack` or else by PEFT."""

    parts: Parts
    model: Any
    adapter: str
    stack: StackedAdapters | None = None

    @property
    def slot(self) -> int:
        assert self.stack is not None
        with self.stack.holding(self.adapter) as slot:  # nothing is removed from a stack of members
            return slot

    def activate(self) -> Any:
        """The model with this member's adapter on, for all rows."""
        if self.stack is not None:
            self.stack.select([self.slot])
        else:
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
        model, names, stack, told = stack_members([members[number] for number in numbers])
        notes += [note for note in told if note not in notes]
        opened |= {
            number: Member(members[number], model, name, stack) for number, name in zip(numbers, names, strict=True)
        }
    return [opened[number] for number in range(len(members))], notes


def answer_together(
    members: Sequence[Member],
    questions: Sequence[Sequence[Question]],
    *,
    labels: Sequence[str],
    kind: Kind,
    sharpen: Callable[[Floats], Floats] = lambda probabilities: probabilities,
) -> Iterator[Answer]:
    """The answer of all to each question; `questions` has, for each member, each as that member is asked.

    A question is truncated where it was for any of them. `sharpen` may change the probabilities of all together.
    """
    if not questions[0]:
        return
    tables: dict[int, Floats] = {}
    truncated = np.zeros(len(questions[0]), dtype=bool)
    for numbers in _in_one_batch(members):
        prompts = []
        for number in numbers:
            fitted = [members[number].parts.fit_prompt(question) for question in questions[number]]
            prompts.append([prompt for prompt, _ in fitted])
            truncated |= np.array([cut for _, cut in fitted], dtype=bool)
        found = _probabilities([members[number] for number in numbers], prompts, labels)
        tables |= dict(zip(numbers, found, strict=True))
    found_together = sharpen(together(np.stack([tables[number] for number in range(len(members))]), kind))
    for row, cut in zip(found_together, truncated, strict=True):
        named = dict(zip(labels, map(float, row), strict=True))
        yield Answer(labels[int(row.argmax())], named, bool(cut))


def _in_one_batch(members: Sequence[Member]) -> list[list[int]]:
    """The numbers of the members that share a stack, and render alike; of others each alone."""
    groups: dict[object, list[int]] = {}
    for number, member in enumerate(members):
        key = number if member.stack is None else (id(member.stack), member.parts.renderer.template_hash)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def _probabilities(
    members: Sequence[Member], prompts: Sequence[Sequence[Sequence[Message]]], labels: Sequence[str]
) -> list[Floats]:
    """Of each member, the probabilities (prompts, labels) of its own prompts: all rows of a batch, each its adapter."""
    first = members[0]
    flat = [prompt for own in prompts for prompt in own]
    slots = (
        [] if first.stack is None else [member.slot for member, own in zip(members, prompts, strict=True) for _ in own]
    )

    def on_batch(rows: Sequence[int]) -> None:
        if first.stack is not None:
            first.stack.select([slots[row] for row in rows])

    found = label_probabilities(
        first.activate(), first.parts.renderer, flat, labels, batch_size=BATCH, on_batch=on_batch
    )
    return np.split(found, len(members))
