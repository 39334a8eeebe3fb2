"""Which checkpoint a run can go on from."""

from __future__ import annotations

from pathlib import Path

# Without any one of these transformers resumes silently to different weights.
REQUIRED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def newest_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint with the most steps that has every file, and a line for each newer one that was passed over."""
    skipped: list[str] = []
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        missing = [name for name in REQUIRED if not (path / name).is_file() or (path / name).stat().st_size == 0]
        if not missing:
            return path, skipped
        skipped.append(f"{path.name} is incomplete ({', '.join(missing)} missing or empty)")
    return None, skipped
