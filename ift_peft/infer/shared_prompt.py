"""Scoring several answers to one prompt with the prompt run once: its keys and values are kept between the answers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ift_peft.data.render import IGNORE, Rendered


def keeps_prompts(model: Any) -> bool:
    """Whether a model takes positions and a cache, as left-padded prompts need; its cache is looked at as well."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(inner.forward).parameters
    return {"position_ids", "past_key_values", "logits_to_keep"} <= parameters.keys()


def common_prefix(group: Sequence[Rendered]) -> int:
    """Tokens that all of a group begin with, at most all but the last token of the shortest."""
    columns = zip(*(row.input_ids for row in group), strict=False)
    shared = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, columns))
    return min(shared, min(len(row.input_ids) for row in group) - 1)


@torch.no_grad()
def answer_log_likelihoods(
    model: Any, groups: Sequence[Sequence[Rendered]], *, pad_token_id: int
) -> list[list[float]] | None:
    """For each group of renderings that begin alike, the log-likelihood of each one's supervised tokens after that.

    Groups are one batch and of one size. What a group has in common is the same factor for all in it and left out.
    None where the model's cache is of a kind that cannot be cut back to the prompt (sliding windows, state spaces).
    """
    device = next(model.parameters()).device
    shared = [common_prefix(group) for group in groups]
    longest = max(shared)
    prompts = torch.full((len(groups), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(prompts)
    for row, (group, length) in enumerate(zip(groups, shared, strict=True)):
        prompts[row, longest - length :] = torch.tensor(group[0].input_ids[:length])
        mask[row, longest - length :] = 1
    prompts, mask = prompts.to(device), mask.to(device)
    output = model(
        input_ids=prompts,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    if not isinstance(cache, DynamicCache) or not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    lengths = torch.tensor(shared, device=device)
    totals = [
        _of_answer(model, [group[which] for group in groups], shared, output.logits, cache, mask, lengths, pad_token_id)
        for which in range(len(groups[0]))
    ]
    return [list(row) for row in zip(*(total.tolist() for total in totals), strict=True)]


def _of_answer(
    model: Any,
    rows: Sequence[Rendered],
    shared: Sequence[int],
    first_logits: Tensor,
    cache: DynamicCache,
    mask: Tensor,
    lengths: Tensor,
    pad_token_id: int,
) -> Tensor:
    """Sum of the log-probabilities of one answer to each prompt, shape (prompts,); the cache is left as it was."""
    tails = [row.input_ids[length:] for row, length in zip(rows, shared, strict=True)]
    wanted = [row.labels[length:] for row, length in zip(rows, shared, strict=True)]
    width = max(map(len, tails))
    tail = torch.tensor([ids + [pad_token_id] * (width - len(ids)) for ids in tails], device=mask.device)
    labels = torch.tensor([ids + [IGNORE] * (width - len(ids)) for ids in wanted], device=mask.device)
    logits = first_logits
    if width > 1:
        steps = torch.arange(width - 1, device=mask.device)
        inside = (steps < torch.tensor([len(ids) - 1 for ids in tails], device=mask.device)[:, None]).long()
        output = model(
            input_ids=tail[:, :-1],
            attention_mask=torch.cat([mask, inside], dim=1),
            position_ids=lengths[:, None] + steps,
            past_key_values=cache,
            use_cache=True,
        )
        cache.crop(-(width - 1))
        logits = torch.cat([first_logits, output.logits], dim=1)
    scores = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return -scores.view(labels.shape).sum(dim=1)
