"""What training minimises: cross-entropy and divergences over supervised positions, all at once or chunk by chunk.

Everything is a sum over supervised tokens; the trainer divides by their number in the whole batch, over all
accumulation steps, so that a loss does not depend on how a batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase

from ift_peft.data.render import IGNORE
from ift_peft.errors import ModelError, RecipeError
from ift_peft.infer.classes import class_logits
from ift_peft.infer.likelihood import supervised_logits
from ift_peft.model.configuration import positions, skeleton
from ift_peft.model.tokenizer import BaseLocation, load_tokenizer, locate_base
from ift_peft.sections import Loss

Head = Callable[[Tensor], Tensor]
Autocast = Callable[[], AbstractContextManager[Any]]


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """In nats, summed over positions; `label_smoothing` as torch defines it (Szegedy et al. 2016, arXiv:1512.00567)."""
    return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)


def divergence(
    logits: Tensor, reference: Tensor, *, direction: Literal["forward", "reverse"], temperature: float = 1.0
) -> Tensor:
    """Kullback-Leibler divergence in nats, summed over positions, times the squared temperature.

    forward is KL(reference || model), reverse KL(model || reference). A temperature T softens both distributions and
    shrinks gradients by 1 / T², which the factor undoes (Hinton et al. 2015, arXiv:1503.02531). Bases of one family
    may pad the vocabulary to different widths; what only one of them has is left out of both.
    """
    width = min(logits.shape[-1], reference.shape[-1])
    ours, theirs = (F.log_softmax(part[..., :width].float() / temperature, dim=-1) for part in (logits, reference))
    of, against = (theirs, ours) if direction == "forward" else (ours, theirs)
    return F.kl_div(against, of, reduction="sum", log_target=True) * temperature**2


@dataclass(frozen=True)
class Positions:
    """What a model holds of n supervised positions: `head(states)` are their logits, of shape (n, vocabulary)."""

    states: Tensor
    targets: Tensor
    head: Head

    def pieces(self, size: int) -> list[Positions]:
        cut = zip(self.states.split(size), self.targets.split(size), strict=True)
        return [Positions(states, targets, self.head) for states, targets in cut]


def after_head(model: Any, batch: dict[str, Tensor]) -> Positions:
    """Supervised positions by the model's own forward: `states` are the logits already."""
    logits, targets, _ = supervised_logits(model, batch)
    return Positions(logits, targets, _as_they_are)


def _as_they_are(states: Tensor) -> Tensor:
    return states


def before_head(
    model: Any, batch: dict[str, Tensor], module: nn.Module, head: Head, *, check: bool = True
) -> Positions | None:
    """Supervised positions as they reach `module`, the head inside `model`; None where that is not all that follows.

    The model's own forward is run, so whatever it does up to the head is done; on the way into the head all but one
    position of each row is taken out. The logits of those are checked to be what `head` makes of them.
    """
    labels = batch["labels"][:, 1:]
    positions = (labels != IGNORE).any(dim=0).nonzero().squeeze(1)
    caught: list[Tensor] = []

    def catch(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        caught.extend(arguments[:1])
        return (*(argument[:, :1] for argument in arguments[:1]), *arguments[1:])

    hook = module.register_forward_pre_hook(catch)
    try:
        output = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            logits_to_keep=positions,
        )
    finally:
        hook.remove()
    targets = labels[:, positions]
    supervised = targets != IGNORE
    if len(caught) != 1 or caught[0].shape[:2] != targets.shape:
        return None
    if check:
        with torch.no_grad():
            if not _equal(output.logits, head(caught[0][:, :1])):
                return None
    return Positions(caught[0][supervised], targets[supervised], head)


def _equal(whole: Tensor, apart: Tensor) -> bool:
    """Equal up to rounding: the same product of the same numbers, so that even a soft cap on small logits shows."""
    if whole.shape != apart.shape:
        return False
    limit = 4 * torch.finfo(apart.dtype).eps * apart.abs().max()
    return not bool((whole.float() - apart.float()).abs().max() > limit)


@dataclass(frozen=True)
class Sums:
    """Of one batch, summed over its supervised tokens: the loss, its unweighted parts, and the tokens guessed right."""

    loss: Tensor
    parts: dict[str, Tensor]
    correct: Tensor
    tokens: int


class Objective:
    """The recipe's section `loss` as a function of a model and a batch.

    `autocast` is entered around a head that is called on its own, as the trainer does around the whole model.
    """

    def __init__(self, section: Loss, *, teacher: Any | None = None, autocast: Autocast = nullcontext) -> None:
        self.section, self.teacher, self.autocast = section, teacher, autocast
        if (teacher is None) != (section.kind == "cross_entropy"):
            raise ValueError("a teacher is given where loss.kind=kl_to_teacher, and only there")
        share = 0.0 if teacher is None else section.teacher_weight
        self.weights = {"cross_entropy": 1.0 - share, "kl_to_base": section.kl_to_base, "kl_to_teacher": share}
        self._proven: set[str] = set()

    def __call__(self, model: Any, batch: dict[str, Tensor], *, bare: Any) -> Sums:
        """`model` is what is trained, as the trainer may have wrapped it; `bare` the PEFT model inside.

        Raises `RecipeError` for `loss.chunk` where a model does more to its logits than its head does.
        """
        references: dict[str, Positions] = {}
        if self.section.kl_to_base:
            with as_base(bare):
                references["kl_to_base"] = self._positions("base", bare, batch, bare)
        if self.teacher is not None:
            with torch.no_grad():
                references["kl_to_teacher"] = self._positions("teacher", self.teacher, batch, self.teacher)
        ours = self._positions("base", model, batch, bare, trained=True)
        tokens = ours.targets.numel()
        size = self.section.chunk or max(1, tokens)
        pieces = zip(*(positions.pieces(size) for positions in (ours, *references.values())), strict=True)
        totals = torch.stack([self._recomputed(*piece) for piece in pieces]).sum(dim=0)
        parts = dict(zip(("cross_entropy", *references), totals, strict=False))
        loss = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return Sums(loss, {name: part.detach() for name, part in parts.items()}, totals[-1].detach(), tokens)

    def _positions(
        self, role: str, model: Any, batch: dict[str, Tensor], bare: Any, *, trained: bool = False
    ) -> Positions:
        if not self.section.chunk:
            return after_head(model, batch)
        module = bare.get_output_embeddings()
        autocast = nullcontext if role == "teacher" else self.autocast

        def head(states: Tensor) -> Tensor:
            with autocast(), nullcontext() if trained else switched_off(module):
                logits: Tensor = module(states)
            return logits

        found = None if module is None else before_head(model, batch, module, head, check=role not in self._proven)
        if found is None:
            raise RecipeError(
                expected=f"a {role} whose logits are what its head makes, as loss.chunk needs",
                found="others: they are soft-capped or scaled after it, or there is no head of its own",
                fix="remove loss.chunk, or set it to 0",
            )
        self._proven.add(role)
        return found

    def _recomputed(self, *positions: Positions) -> Tensor:
        """The terms; with chunks, logits are made again in the backward pass and not kept until then."""
        if not self.section.chunk:
            return self._terms(*positions)
        again: Tensor = checkpoint(self._terms, *positions, use_reentrant=False, preserve_rng_state=False)
        return again

    def _terms(self, ours: Positions, *references: Positions) -> Tensor:
        """Cross-entropy, a divergence from each reference, and the number of tokens guessed right."""
        section = self.section
        logits = ours.head(ours.states)
        terms = [cross_entropy(logits, ours.targets, label_smoothing=section.label_smoothing)]
        for reference in references:
            with torch.no_grad():
                other = reference.head(reference.states)
            terms.append(divergence(logits, other, direction=section.kl_direction, temperature=section.temperature))
        return torch.stack([*terms, (logits.argmax(-1) == ours.targets).sum().to(terms[0])])


class ClassObjective:
    """Cross-entropy of a classifier's head over rows, each of which holds the number of its class."""

    def __init__(self, section: Loss) -> None:
        self.section = section

    def __call__(self, model: Any, batch: dict[str, Tensor], *, bare: Any) -> Sums:
        """As `Objective`, with rows in the place of supervised tokens."""
        logits, classes = class_logits(model, batch)
        loss = cross_entropy(logits, classes, label_smoothing=self.section.label_smoothing)
        correct = (logits.argmax(-1) == classes).sum().to(loss)
        return Sums(loss, {"cross_entropy": loss.detach()}, correct.detach(), classes.numel())


@contextmanager
def as_base(model: Any) -> Iterator[None]:
    """A PEFT model as its base: adapter off, without dropout and gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter():
            yield
    finally:
        model.train(was_training)


@contextmanager
def switched_off(module: Any) -> Iterator[None]:
    """One module without the adapter or the trained copy that PEFT may have given it."""
    switch = getattr(module, "enable_adapters", None)
    if switch is None:
        yield
        return
    switch(False)
    try:
        yield
    finally:
        switch(True)


def find_teacher(
    section: Loss, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> BaseLocation | None:
    """Where the teacher is, if there is one.

    Raises `ModelError` for one that is nowhere, reads other tokens than the base, or cannot take `max_length` of them.
    """
    if section.teacher is None:
        return None
    try:
        location = locate_base(section.teacher, revision=section.teacher_revision)
    except ModelError as error:
        expected, fix = error.expected.replace("base.model", "loss.teacher"), error.fix.partition(", or use base.")[0]
        raise ModelError(expected=expected, found=error.found, fix=fix) from None
    ours, theirs = tokenizer.get_vocab().items(), load_tokenizer(location).get_vocab().items()
    if ours != theirs:
        raise ModelError(
            expected="a teacher with the tokens of the base, each with the same number",
            found=f"{len(ours ^ theirs):,} that differ between {len(ours):,} and the teacher's {len(theirs):,}",
            fix="choose a teacher of the base's own family, or loss.kind=cross_entropy",
        )
    most = positions(skeleton(location).config)
    if most and (max_length is None or max_length > most):
        raise ModelError(
            expected=f"training.max_length of at most {most}, the positions of the teacher",
            found=repr(max_length),
            fix=f"set training.max_length={most}",
        )
    return location
