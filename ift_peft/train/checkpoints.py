"""Which checkpoint a run can go on from."""

from __future__ import annotations

import json
from pathlib import Path

# Without any one of these transformers resumes silently to different weights.
REQUIRED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
ALLOCATION = "rank_allocation.safetensors"  # of AdaLoRA: the importances by which ranks are taken away


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint with the most steps that has every file, and a line for each newer one that was passed over."""
    skipped: list[str] = []
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        required = (*REQUIRED, ALLOCATION) if _is_adalora(path) else REQUIRED
        missing = [name for name in required if not (path / name).is_file() or (path / name).stat().st_size == 0]
        if not missing:
            return path, skipped
        skipped.append(f"{path.name} is incomplete ({', '.join(missing)} missing or empty)")
    return None, skipped


def _is_adalora(checkpoint: Path) -> bool:
    config = checkpoint / "adapter_config.json"
    return config.is_file() and json.loads(config.read_text("utf-8")).get("peft_type") == "ADALORA"
