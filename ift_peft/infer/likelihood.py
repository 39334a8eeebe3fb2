"""How likely a model finds given answers: the measure behind classification, loss and perplexity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ift_peft.data.render import IGNORE, Rendered, Renderer
from ift_peft.data.row import Message
from ift_peft.errors import ModelError
from ift_peft.infer.shared_prompt import answer_log_likelihoods, keeps_prompts

Progress = Callable[[int, int], None]  # rows done, rows in all


@dataclass(frozen=True)
class Likelihood:
    """Of one answer: natural log of its probability, and the number of its tokens (end token included)."""

    log_probability: float
    tokens: int


def pad(rendered: Sequence[Rendered], pad_token_id: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, int64 of shape (rows, longest), padded on the right."""
    longest = max(len(row.input_ids) for row in rendered)
    shape = (len(rendered), longest)
    batch = {
        "input_ids": torch.full(shape, pad_token_id, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORE, dtype=torch.long),
    }
    for index, row in enumerate(rendered):
        length = len(row.input_ids)
        batch["input_ids"][index, :length] = torch.tensor(row.input_ids)
        batch["attention_mask"][index, :length] = 1
        batch["labels"][index, :length] = torch.tensor(row.labels)
    return batch


def supervised_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits where a label is predicted, and nowhere else.

    Returns logits (n, vocabulary), the n target ids, and the n row numbers in the batch. The head is run on the
    positions that are supervised in some row of the batch; prompt tokens before all of them cost no logits.
    """
    labels = batch["labels"][:, 1:]
    positions = (labels != IGNORE).any(dim=0).nonzero().squeeze(1)
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
        logits_to_keep=positions,
    )
    targets = labels[:, positions]
    supervised = targets != IGNORE
    rows = supervised.nonzero()[:, 0]
    return output.logits[supervised], targets[supervised], rows


@torch.no_grad()
def answer_likelihoods(
    model: Any,
    rendered: Sequence[Rendered],
    *,
    batch_size: int,
    pad_token_id: int,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """The likelihood of the supervised tokens of each row, given the tokens before them, in the order of the rows."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    results: list[Likelihood | None] = [None] * len(rendered)
    done = 0
    for indices in _by_length(rendered, batch_size):
        batch = {k: v.to(device) for k, v in pad([rendered[i] for i in indices], pad_token_id).items()}
        logits, targets, rows = supervised_logits(model, batch)
        log_probs = -F.cross_entropy(logits.float(), targets, reduction="none")
        sums = torch.zeros(len(indices), device=device).index_add_(0, rows, log_probs)
        _require_finite(bool(torch.isfinite(sums).all()))
        counts = torch.bincount(rows, minlength=len(indices))
        for index, total, count in zip(indices, sums.tolist(), counts.tolist(), strict=True):
            results[index] = Likelihood(total, count)
        done += len(indices)
        if progress is not None:
            progress(done, len(rendered))
    model.train(was_training)
    return [result for result in results if result is not None]


def _require_finite(finite: bool) -> None:
    if not finite:
        raise ModelError(
            expected="finite likelihoods",
            found="NaN or infinity in the logits",
            fix="use base.compute_dtype=float32, or bfloat16 on a GPU that has it",
        )


def _by_length(rendered: Sequence[Rendered], batch_size: int) -> Iterator[list[int]]:
    """Row numbers in batches of like length, longest first, so that memory runs out at once if at all."""
    order = sorted(range(len(rendered)), key=lambda i: -len(rendered[i].input_ids))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def label_probabilities(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[Sequence[Message]],
    labels: Sequence[str],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """The probability of each label as the answer to each prompt, float64 of shape (prompts, labels).

    A label's likelihood is the product over all its tokens and the end token, which makes labels of different length,
    and labels that begin alike, comparable; a row is normalised over the labels.
    """
    conversations = [(*prompt, {"role": "assistant", "content": label}) for prompt in prompts for label in labels]
    rendered = renderer.render(conversations)
    groups = [rendered[start : start + len(labels)] for start in range(0, len(rendered), len(labels))]
    pad_token_id = renderer.tokenizer.pad_token_id
    found = _shared(model, groups, batch_size, pad_token_id, progress) if keeps_prompts(model) else None
    if found is None:
        likelihoods = answer_likelihoods(
            model, rendered, batch_size=batch_size, pad_token_id=pad_token_id, progress=progress
        )
        found = [one.log_probability for one in likelihoods]
    logs = np.array(found, dtype=np.float64).reshape(len(prompts), len(labels))
    shifted = np.exp(logs - logs.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def _shared(
    model: Any, groups: Sequence[Sequence[Rendered]], batch_size: int, pad_token_id: int, progress: Progress | None
) -> list[float] | None:
    """Log-likelihoods of all answers in order, each prompt run once; None where the model's cache does not allow it."""
    was_training = model.training
    model.eval()
    results: list[list[float]] = [[] for _ in groups]
    done = 0
    for indices in _by_length([group[0] for group in groups], batch_size):
        found = answer_log_likelihoods(model, [groups[index] for index in indices], pad_token_id=pad_token_id)
        if found is None:
            model.train(was_training)
            return None
        for index, logs in zip(indices, found, strict=True):
            results[index] = logs
        done += sum(len(groups[index]) for index in indices)
        if progress is not None:
            progress(done, sum(map(len, groups)))
    model.train(was_training)
    flat = [log for logs in results for log in logs]
    _require_finite(bool(np.isfinite(flat).all()))
    return flat
