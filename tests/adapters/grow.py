"""Print by how many bytes the process grew while merging: grow.py BASE ADAPTER OUTPUT SHARD."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from ift_peft.adapters.plan import plan_merge
from ift_peft.adapters.shards import write_merged
from ift_peft.model.memory import Meter
from ift_peft.model.tokenizer import BaseLocation


def main(base: Path, adapter: Path, output: Path, shard: int) -> None:
    output.mkdir()
    plan = plan_merge(BaseLocation("base", base, None), adapter, head=None)
    meter = Meter(torch.device("cpu"))
    write_merged(plan, output, base=base, adapter=adapter, max_shard_size=shard, progress=lambda done, total: None)
    found = meter.read()
    print(json.dumps({"grown": found["peak_rss_in_training_bytes"] - found["rss_before_training_bytes"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
