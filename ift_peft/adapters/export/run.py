"""A run exported: built in a hidden folder, proved, read for local paths, and only then put where it is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ift_peft.adapters.checkpoint import sha256
from ift_peft.adapters.export.building import Building, merged, peft, vllm
from ift_peft.adapters.export.cards import about
from ift_peft.adapters.export.gguf_file import Outtype
from ift_peft.adapters.export.llama import gguf, gguf_adapter, ollama
from ift_peft.adapters.export.public import check_public
from ift_peft.adapters.plan import ADAPTER_FILE
from ift_peft.durable import scratch_beside, write_atomically
from ift_peft.environment import git_state, versions
from ift_peft.errors import ExportError
from ift_peft.infer.load import Parts
from ift_peft.reporter import Reporter

Target = Literal["peft", "merged", "gguf", "gguf-adapter", "ollama", "vllm"]
RECORD = "export.json"
_BUILDERS: dict[Target, tuple[Callable[[Building], dict[str, Any]], tuple[Outtype, ...]]] = {
    "peft": (peft, ()),
    "merged": (merged, ("f32", "f16", "bf16")),
    "gguf": (gguf, ("f16", "f32", "bf16", "q8_0")),
    "gguf-adapter": (gguf_adapter, ("f32", "f16")),
    "ollama": (ollama, ("f16", "f32", "bf16", "q8_0")),
    "vllm": (vllm, ()),
}


@dataclass(frozen=True)
class Exported:
    """Where an export is, its files, and what was found out about it: as in its export.json."""

    folder: Path
    files: tuple[str, ...]
    checked: dict[str, Any]


def export(
    parts: Parts,
    *,
    to: Target,
    output: Path,
    reporter: Reporter,
    outtype: Outtype | None = None,
    force: bool = False,
) -> Exported:
    """Write the run to `output` in the form `to`, whole or not at all, with export.json about what was checked.

    `outtype` is the type of weights; by default float32 for `merged` and `gguf-adapter`, float16 for `gguf` and
    `ollama`; the others have the adapter's own. With `force` an earlier export at `output` is replaced.

    Raises `ExportError` where `output` exists, where the run cannot be had in this form, where llama.cpp answers
    otherwise than the run, and where a file would name a place of this machine; what merging raises as well.
    """
    build, outtypes = _BUILDERS[to]
    if outtype is not None and outtype not in outtypes:
        one_of = f"one of {', '.join(outtypes)}" if outtypes else "none: the adapter's own type is kept"
        raise ExportError(expected=f"--outtype for {to} to be {one_of}", found=outtype, fix="leave it away")
    _check_output(output, force=force)
    output.parent.mkdir(parents=True, exist_ok=True)
    with scratch_beside(output) as scratch:
        folder, work = scratch / "out", scratch / "work"
        folder.mkdir()
        work.mkdir()
        building = Building(parts, folder, work, outtype or (outtypes[0] if outtypes else "f32"), reporter)
        checked = build(building)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() or path.suffix == ".sh" else 0o644)  # safetensors writes 0600
        _write_record(parts, to, folder, checked)
        check_public(folder, places=(Path.home(), Path.cwd(), parts.run.path, parts.location.folder, scratch, output))
        files = tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
        _put(folder, output, aside=scratch / "replaced", force=force)
    return Exported(output, files, checked)


def _put(folder: Path, output: Path, *, aside: Path, force: bool) -> None:
    """Rename `folder` to `output`; an earlier export there goes `aside`, and back where the renaming fails."""
    _check_output(output, force=force)  # again: something may have come there while it was built
    if not output.exists():
        os.replace(folder, output)
        return
    os.replace(output, aside)
    try:
        os.replace(folder, output)
    except OSError:
        os.replace(aside, output)
        raise


def _check_output(output: Path, *, force: bool) -> None:
    if not output.exists():
        return
    if not force:
        raise ExportError(expected=f"no {output} yet", found="it exists", fix="give another --output, or --force")
    if not (output / RECORD).is_file():
        raise ExportError(
            expected=f"{output} to be an earlier export, which --force replaces",
            found=f"no {RECORD} in it",
            fix="remove it yourself, or give another --output",
        )


def _write_record(parts: Parts, to: Target, folder: Path, checked: dict[str, Any]) -> None:
    found = about(parts)
    manifest = parts.run.read("manifest.json")
    content = {
        "to": to,
        "run": {"name": parts.recipe.name, "id": parts.run.path.name},
        "base": {
            "name": found.base,
            "revision": found.revision,
            "licence": found.licence,
            "fingerprint": manifest["inputs"]["base_fingerprint"],
            "quantization": parts.recipe.base.quantization,
        },
        "adapter": {"sha256": sha256(parts.run.adapter / ADAPTER_FILE)},
        "checked": checked,
        "files": {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
        "versions": versions(),
        "git": git_state(),
    }
    write_atomically(folder / RECORD, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
