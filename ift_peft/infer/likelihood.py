"""How likely a model finds given answers: the measure behind classification, loss and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ift_peft.data.classify import ClassRenderer
from ift_peft.data.render import IGNORE, Rendered, TokenRenderer
from ift_peft.data.row import Message
from ift_peft.infer.batches import OnBatch, Progress, by_length, pad, require_finite
from ift_peft.infer.classes import all_class_logits
from ift_peft.infer.shared_prompt import answer_log_likelihoods, keeps_prompts


@dataclass(frozen=True)
class Likelihood:
    """Of one answer: natural log of its probability, and the number of its tokens (end token included)."""

    log_probability: float
    tokens: int


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
    on_batch: OnBatch | None = None,
) -> list[Likelihood]:
    """The likelihood of the supervised tokens of each row, given the tokens before them, in the order of the rows.

    `on_batch` is called with the numbers of the rows of each batch before it is run.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    results: list[Likelihood | None] = [None] * len(rendered)
    done = 0
    for indices in by_length(rendered, batch_size):
        if on_batch is not None:
            on_batch(indices)
        batch = {k: v.to(device) for k, v in pad([rendered[i] for i in indices], pad_token_id).items()}
        logits, targets, rows = supervised_logits(model, batch)
        log_probs = -F.cross_entropy(logits.float(), targets, reduction="none")
        sums = torch.zeros(len(indices), device=device).index_add_(0, rows, log_probs)
        require_finite(bool(torch.isfinite(sums).all()))
        counts = torch.bincount(rows, minlength=len(indices))
        for index, total, count in zip(indices, sums.tolist(), counts.tolist(), strict=True):
            results[index] = Likelihood(total, count)
        done += len(indices)
        if progress is not None:
            progress(done, len(rendered))
    model.train(was_training)
    return [result for result in results if result is not None]


def label_probabilities(
    model: Any,
    renderer: TokenRenderer,
    prompts: Sequence[Sequence[Message]],
    labels: Sequence[str],
    *,
    batch_size: int,
    progress: Progress | None = None,
    on_batch: OnBatch | None = None,
) -> NDArray[np.float64]:
    """The probability of each label as the answer to each prompt, float64 of shape (prompts, labels).

    A label's likelihood is the product over all its tokens and the end token, which makes labels of different length,
    and labels that begin alike, comparable; a row is normalised over the labels. Of a classifier with a head it is the
    softmax of the head's logits. `on_batch` is called with the numbers of the prompts, one for each row of a batch,
    before that batch is run.
    """
    if isinstance(renderer, ClassRenderer):
        found = all_class_logits(
            model,
            renderer.prompts(prompts),
            batch_size=batch_size,
            pad_token_id=renderer.tokenizer.pad_token_id,
            progress=progress,
            on_batch=on_batch,
        )
        order = [renderer.classes.index(label) for label in labels]
        return np.asarray(found.double().softmax(dim=-1)[:, order])
    conversations = [(*prompt, {"role": "assistant", "content": label}) for prompt in prompts for label in labels]
    rendered = renderer.render(conversations)
    groups = [rendered[start : start + len(labels)] for start in range(0, len(rendered), len(labels))]
    pad_token_id = renderer.tokenizer.pad_token_id
    logs = _shared(model, groups, batch_size, pad_token_id, progress, on_batch) if keeps_prompts(model) else None
    if logs is None:

        def on_rows(rows: Sequence[int]) -> None:
            if on_batch is not None:
                on_batch([row // len(labels) for row in rows])

        likelihoods = answer_likelihoods(
            model,
            rendered,
            batch_size=batch_size,
            pad_token_id=pad_token_id,
            progress=progress,
            on_batch=on_rows,
        )
        logs = [one.log_probability for one in likelihoods]
    table = np.array(logs, dtype=np.float64).reshape(len(prompts), len(labels))
    shifted = np.exp(table - table.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def _shared(
    model: Any,
    groups: Sequence[Sequence[Rendered]],
    batch_size: int,
    pad_token_id: int,
    progress: Progress | None,
    on_batch: OnBatch | None,
) -> list[float] | None:
    """Log-likelihoods of all answers in order, each prompt run once; None where the model's cache does not allow it."""
    was_training = model.training
    model.eval()
    results: list[list[float]] = [[] for _ in groups]
    done = 0
    for indices in by_length([group[0] for group in groups], batch_size):
        if on_batch is not None:
            on_batch(indices)
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
    require_finite(bool(np.isfinite(flat).all()))
    return flat
