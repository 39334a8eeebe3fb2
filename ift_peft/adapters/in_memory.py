"""Merging in memory, by PEFT alone: for adapters and bases that are not merged weight by weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from ift_peft.adapters.checkpoint import DEFAULT_SHARD
from ift_peft.infer.load import Parts, load_model


@torch.no_grad()
def write_in_memory(parts: Parts, folder: Path, max_shard_size: int | str) -> None:
    """Write the whole merged model to `folder` as float32, a tied head untied where the adapter changes either side."""
    model, _ = load_model(parts, quantization="none", compute_dtype="float32")
    _untie(model)
    merged = model.merge_and_unload(safe_merge=True)
    merged.config.dtype = torch.float32
    merged.save_pretrained(folder, max_shard_size=max_shard_size or DEFAULT_SHARD)


def _untie(model: Any) -> None:
    """Give the head weights of its own where it shares them with an embedding, and the adapter changes one of them."""
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or not base.config.tie_word_embeddings:
        return
    if not any(isinstance(one, BaseTunerLayer | ModulesToSaveWrapper) for one in (head, embedding)):
        return
    if not isinstance(head, ModulesToSaveWrapper):  # whose trained copy is its own already
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    base.config.tie_word_embeddings = False
