"""Checkpoints on disk: what safetensors files hold, read by their headers, and shards written one at a time."""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ift_peft.errors import MergeError, first_line, raise_all

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
DEFAULT_SHARD = 5 * 10**9  # bytes; huggingface_hub's own

Read = Callable[[Path, str], Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there and its shape."""

    file: Path
    key: str
    shape: tuple[int, ...]


def tensors_of(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds, by its header. Raises `MergeError` for a file that is missing or broken."""
    try:
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
            return {key: Stored(file, key, tuple(opened.get_slice(key).get_shape())) for key in keys}
    except (OSError, SafetensorError) as error:
        raise MergeError(
            expected=f"a safetensors file {file.name}", found=first_line(error), fix=f"restore {file}"
        ) from None


def shard_files(folder: Path) -> list[Path]:
    """The weight files that transformers reads: the whole one, else those that the index names."""
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    if not (folder / INDEX).is_file():
        raise MergeError(expected=f"{WHOLE} or {INDEX} in {folder}", found="neither", fix="give a complete base")
    named = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(named))]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint. Raises `Faults` or `MergeError` for files or tensors that its index wants."""
    found: dict[str, Stored] = {}
    faults = []
    for file in shard_files(folder):
        try:
            found |= tensors_of(file)
        except MergeError as error:
            faults.append(error)
    if (folder / INDEX).is_file() and not (folder / WHOLE).is_file() and not faults:
        named = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        faults += [
            MergeError(expected=f"{key} in {file}", found="none", fix="download the base again")
            for key, file in named.items()
            if key not in found
        ]
    raise_all(faults)
    return found


def default_shard_size(folder: Path) -> int:
    """Bytes of the largest shard of a checkpoint in several, else 5 GB."""
    files = shard_files(folder)
    return DEFAULT_SHARD if len(files) == 1 else max(file.stat().st_size for file in files)


@contextmanager
def reading() -> Iterator[Read]:
    """Read tensors with one file open at a time: what was read of the file before is let go."""
    opened: dict[Path, Any] = {}

    def read(file: Path, key: str) -> Tensor:
        if file not in opened:
            opened.clear()
            opened[file] = safe_open(file, "pt")
        tensor: Tensor = opened[file].get_tensor(key)
        return tensor

    try:
        yield read
    finally:
        opened.clear()


def write_shards(
    folder: Path,
    empty: Mapping[str, Tensor],
    tensor_of: Callable[[str], Tensor],
    *,
    max_shard_size: int | str,
) -> None:
    """Write the tensors named in `empty`, which has their shapes and types (on the meta device), as shards.

    Each is asked of `tensor_of` when its turn comes, and one shard of at most `max_shard_size` bytes is held at a time;
    a tensor larger than that gets a shard of its own.
    """
    split = split_torch_state_dict_into_shards(
        dict(empty), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for name, keys in split.filename_to_tensors.items():
        shard = _room_for({key: empty[key] for key in keys})
        for key, place in shard.items():
            place.copy_(tensor_of(key))
            _give_back()
        save_file(shard, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _room_for(empty: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of these shapes and types, side by side in one piece of memory, without holes between them."""
    starts, end = {}, 0
    for key, tensor in empty.items():
        starts[key] = end
        end += -(-tensor.nbytes // 16) * 16  # any type may begin at a multiple of 16 bytes
    piece = torch.empty(end, dtype=torch.uint8)
    return {
        key: piece[starts[key] : starts[key] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for key, tensor in empty.items()
    }


def _give_back() -> None:
    """Free memory back to the system, where glibc would keep it: the process would grow to the size of the model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def recast(source: Path, target: Path, *, dtype: torch.dtype) -> None:
    """A copy of a checkpoint's weights as `dtype`, file by file; integers stay as they are."""
    total = 0
    for file in shard_files(source):
        with reading() as read:
            tensors = {key: _cast(read(file, key), dtype) for key in tensors_of(file)}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    if (source / INDEX).is_file():
        index = json.loads((source / INDEX).read_text("utf-8"))
        index["metadata"]["total_size"] = total
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
