"""What a run will write, against the room there is, before its folder is made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ift_peft.errors import DiskFull
from ift_peft.model.tokenizer import BaseLocation
from ift_peft.reporter import Reporter

_WEIGHT = 4  # bytes: adapters are kept in float32
_BESIDE = 128 * 1024  # bytes: headers of tensors, JSON, generators
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "vocab.txt", "added_tokens.json")


def checkpoint_bytes(trained: int, *, optim: str) -> int:
    """Of one checkpoint: `trained` parameters and what the optimizer `optim` keeps of each.

    Two moments in float32 for Adam and what comes from it, one for Lion, in a byte each where these are quantised; of
    others nothing is counted. The states of random generators and of the trainer, which do not grow with the adapter,
    are.
    """
    moments = 0
    if any(name in optim for name in ("adam", "lamb", "lion", "ademamix")):
        moments = (1 if "lion" in optim else 2) * (1 if "8bit" in optim else _WEIGHT)
    return trained * (_WEIGHT + moments) + _BESIDE


def room_needed(
    trained: int, location: BaseLocation, *, optim: str, keep: int | None, saves: bool, embeddings: bool
) -> int:
    """Bytes of the adapter and of the checkpoints that lie beside each other, each with a tokenizer.

    `keep` is `save_total_limit`: one more is written before the oldest goes. None: all are kept, and one is counted.
    PEFT writes `embeddings` that are adapted into each checkpoint, whole.
    """
    tokenizer = sum(
        (location.folder / name).stat().st_size for name in _TOKENIZER if (location.folder / name).is_file()
    )
    checkpoints = (1 if keep is None else keep + 1) if saves else 0
    config = location.config()
    whole = int(config.get("vocab_size", 0)) * int(config.get("hidden_size", 0)) * _WEIGHT if embeddings else 0
    each = checkpoint_bytes(trained, optim=optim) + tokenizer + whole
    return trained * _WEIGHT + tokenizer + checkpoints * each


def free_room(folder: Path) -> int:
    """Bytes free where `folder` is, or will be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def bytes_in(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def require_room(
    needed: int, folder: Path, reporter: Reporter, *, all_kept: bool = False, there: int | None = None
) -> dict[str, Any]:
    """The entry `disk` of the manifest. Raises `DiskFull` where `folder` has less than `needed` bytes free.

    `all_kept`: every checkpoint stays, and only one of them is in `needed`. `there`: so many of the bytes have been
    written already, by a run whose folder and recipe stay what they are; None for one that begins.
    """
    free = free_room(folder.resolve())
    missing = max(0, needed - (there or 0))
    told = f"about {_size(missing)} for checkpoints and adapter"
    if missing > free:
        others = "choose another folder with --runs-dir, or lower training.save_total_limit or adapter.r"
        raise DiskFull(
            expected=f"{told} in {folder}",
            found=f"{_size(free)} free",
            fix=f"make room, {others}" if there is None else "make room; the run is as it was",
        )
    if all_kept:
        reporter.note(f"training.save_total_limit is not set: every checkpoint is kept, and {told} is but the first")
    return {"foreseen_bytes": needed, "free_before_bytes": free}


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
