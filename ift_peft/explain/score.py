"""What is explained: one number for each version of a prompt. Another kind of run brings another `Score`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ift_peft.data.render import IGNORE, Rendered
from ift_peft.infer.batches import pad
from ift_peft.infer.classes import class_logits
from ift_peft.infer.likelihood import supervised_logits


class Score(Protocol):
    """A number in nats for each prompt of a batch, differentiable in the prompts' embeddings.

    `name` says what it is.
    """

    @property
    def name(self) -> str: ...

    def __call__(self, model: Any, embedded: Tensor, kept: Tensor) -> Tensor:
        """Scores of shape (n,), float32, of prompts of shape (n, length, width).

        `kept` is bool of shape (n, length): tokens where it is False are taken out, and the rest moves together.
        """


@dataclass(frozen=True)
class AnswerScore:
    """Log-likelihood of the chosen answer; where there are others, its log-odds: log p(chosen) - log sum p(others).

    The likelihoods are those of `ift predict`: of all of an answer's tokens, its end token included. `answers` are
    what follows the prompt: ids, and labels that are IGNORE where nothing is scored.
    """

    answers: tuple[Rendered, ...]
    chosen: int

    @property
    def name(self) -> str:
        return "log-odds" if len(self.answers) > 1 else "log-likelihood"

    def __call__(self, model: Any, embedded: Tensor, kept: Tensor) -> Tensor:
        logs = log_likelihoods(model, embedded, kept, self.answers)
        chosen = logs[:, self.chosen]
        if len(self.answers) == 1:
            return chosen
        others = [number for number in range(len(self.answers)) if number != self.chosen]
        return chosen - logs[:, others].logsumexp(dim=1)


@dataclass(frozen=True)
class ClassScore:
    """Log-odds of the chosen class by a classifier's head: log p(chosen) - log sum p(others)."""

    chosen: int
    name: str = "log-odds"

    def __call__(self, model: Any, embedded: Tensor, kept: Tensor) -> Tensor:
        # Prompts of one length at a time: heads read the first token or the last, which padding may not be.
        lengths = kept.sum(dim=1)
        scores = torch.zeros(len(embedded), device=embedded.device)
        weight = next(p for p in model.get_input_embeddings().parameters())
        for length in lengths.unique().tolist():
            at = (lengths == length).nonzero()[:, 0]
            inputs = embedded[at][kept[at]].view(len(at), int(length), -1).to(weight.dtype)
            logits = model(inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2]).to(inputs)).logits.float()
            others = [number for number in range(logits.shape[1]) if number != self.chosen]
            scores = scores.index_put((at,), logits[:, self.chosen] - logits[:, others].logsumexp(dim=1))
        return scores


def answer_score(prompt_ids: Sequence[int], rendered: Sequence[Rendered], *, chosen: int) -> AnswerScore:
    """The score of answer `chosen` among `rendered`, conversations that all begin with the prompt."""
    start = len(prompt_ids)
    answers = []
    for row in rendered:
        assert row.input_ids[:start] == list(prompt_ids)  # the renderer has checked it
        end = max(index for index, label in enumerate(row.labels) if label != IGNORE) + 1
        answers.append(Rendered(row.input_ids[start:end], row.labels[start:end]))
    return AnswerScore(tuple(answers), chosen)


def answer_loss(model: Any, rendered: Rendered, *, pad_token_id: int) -> Tensor:
    """What one row adds to the loss of training, in nats: the cross-entropy summed over its supervised tokens."""
    device = next(model.parameters()).device
    batch = {name: part.to(device) for name, part in pad([rendered], pad_token_id).items()}
    logits, targets, _ = supervised_logits(model, batch)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def class_loss(model: Any, rendered: Rendered, *, pad_token_id: int) -> Tensor:
    """As `answer_loss`, of a row with a class for a classifier's head."""
    device = next(model.parameters()).device
    logits, classes = class_logits(model, {k: v.to(device) for k, v in pad([rendered], pad_token_id).items()})
    return F.cross_entropy(logits.float(), classes, reduction="sum")


def log_likelihoods(model: Any, embedded: Tensor, kept: Tensor, answers: Sequence[Rendered]) -> Tensor:
    """Of each answer after each prompt, in nats, float32 of shape (prompts, answers); see `Score` for the arguments."""
    prompts, length, width = embedded.shape
    device, count = embedded.device, len(answers)
    # What is taken out moves to the left, where padding stands in a batch: a shorter prompt, not one with holes.
    order = kept.long().argsort(dim=1, stable=True)
    embedded = embedded.gather(1, order[:, :, None].expand(-1, -1, width)).repeat_interleave(count, dim=0)
    kept = kept.gather(1, order).repeat_interleave(count, dim=0)
    longest = max(len(answer.input_ids) for answer in answers)
    padding = [longest - len(answer.input_ids) for answer in answers]
    ids = torch.tensor([a.input_ids + [0] * more for a, more in zip(answers, padding, strict=True)], device=device)
    targets = torch.tensor(
        [a.labels + [IGNORE] * more for a, more in zip(answers, padding, strict=True)], device=device
    )
    inside = torch.tensor([[True] * (longest - more) + [False] * more for more in padding], device=device)
    after = model.get_input_embeddings()(ids)
    mask = torch.cat([kept, inside.repeat(prompts, 1)], dim=1).long()
    output = model(
        inputs_embeds=torch.cat([embedded.to(after.dtype), after.repeat(prompts, 1, 1)], dim=1),
        attention_mask=mask,
        use_cache=False,
        logits_to_keep=torch.arange(length - 1, length + longest - 1, device=device),
        **({"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if _takes_positions(model) else {}),
    )
    losses = F.cross_entropy(
        output.logits.float().transpose(1, 2), targets.repeat(prompts, 1), ignore_index=IGNORE, reduction="none"
    )
    return -losses.sum(dim=1).view(prompts, count)


def _takes_positions(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "position_ids" in inspect.signature(inner.forward).parameters
