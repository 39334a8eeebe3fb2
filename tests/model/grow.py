"""Print what steps were foreseen to need, and what a process grew by: grow.py BASE,ROWS,LENGTH,POSITIONS ...

Each is measured in a child of its own, which has its own peak; the imports are for all of them.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from peft import get_peft_model
from torch.nn import functional as F

from ift_peft.model.adapter import peft_config
from ift_peft.model.base import load_base
from ift_peft.model.memory import Batch, Meter, foresee
from ift_peft.model.quiet import quiet
from ift_peft.model.tokenizer import locate_base
from ift_peft.sections import Adapter


def measure(base: str, rows: int, length: int, positions: int) -> None:
    location, adapter = locate_base(base), Adapter()
    needed = foresee(location, adapter, Batch(rows, length, positions), dtype=torch.float32)
    with quiet():
        bare = load_base(location, device="cpu").model
        config = peft_config(adapter, bare, base_name=str(location.folder), revision=None)
        model = get_peft_model(bare, config).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])

    def step(length: int, positions: int) -> None:
        ids = torch.zeros(rows, length, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # padded, as batches are
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=positions).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), torch.zeros(rows * positions, dtype=torch.long))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(8, 8)  # libraries, and the optimizer's moments
    meter = Meter(torch.device("cpu"))
    for _ in range(2):
        step(length, positions)
    read = meter.read()
    grown = read["peak_rss_in_training_bytes"] - read["rss_before_training_bytes"]
    found = {"grown": grown, "activations": needed.activations, "logits": needed.logits}
    print("found", json.dumps(found), flush=True)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        base, *numbers = case.split(",")
        child = os.fork()
        if not child:
            measure(base, *map(int, numbers))
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{case} could not be measured")
