"""What is handed out names no place of this machine: every file of an export is read for one before it is let go."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ift_peft.errors import ExportError, IftPeftError, raise_all
from ift_peft.report.provenance import is_absolute

# The content of a vocabulary is the base's own, and has pieces such as "/root" or "C:\\" in it.
_VOCABULARY = {"tokenizer.json": ("vocab", "merges"), "gguf": ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")}
_HOMES = re.compile(
    r"file:/[^\s'\"<>|]+|(?:(?<![\w./\\<:])/(?:home|Users|root|mnt|tmp)/|\b[A-Za-z]:\\{1,2}Users\\)[^\s'\"<>|]+"
)


def check_public(folder: Path, *, places: Iterable[Path]) -> int:
    """How many texts of the files in `folder` were read: file contents, values of JSON, safetensors and GGUF metadata.

    Raises `Faults` or `ExportError` for every file that holds one of `places` or a folder above it (the root apart), a
    path below a home or temporary folder, or a setting that is an absolute path.
    """
    known = _with_parents(places)
    faults: list[IftPeftError] = []
    count = 0
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        for where, text, whole in _texts(file):
            count += 1
            found = _place(text, known) or (text if whole and is_absolute(text) else None)
            if found is not None:
                faults.append(
                    ExportError(
                        expected=f"no path of this machine in {file.relative_to(folder)}",
                        found=f"{found[:120]!r} in {where}",
                        fix="remove it from the recipe, its description or the base's files; nothing was written",
                    )
                )
                break
    raise_all(faults)
    return count


def _with_parents(places: Iterable[Path]) -> list[str]:
    found = set()
    for place in places:
        for path in {place.absolute(), place.resolve()}:
            found |= {str(one) for one in (path, *path.parents) if len(one.parts) > 1}
    return sorted(found, key=len, reverse=True)


def _place(text: str, known: Iterable[str]) -> str | None:
    """The first of the `known` folders that stands in `text` as one, with something below it or at its end."""
    for folder in known:
        match = re.search(rf"(?<![\w.:/<]){re.escape(folder)}(?=[/\\'\"\s,)\]]|$)", text)
        if match and (len(Path(folder).parts) > 2 or text[match.end() : match.end() + 1] in "/\\" or match.end() == 0):
            return text[match.start() : match.end() + 60].split("\n")[0]
    home = _HOMES.search(text)
    return home.group() if home else None


def _texts(file: Path) -> Iterator[tuple[str, str, bool]]:
    """Where a text of the file stands, the text, and whether it is the whole of one setting."""
    if file.suffix == ".json":
        skipped = _VOCABULARY.get(file.name, ())
        for where, text in _strings(json.loads(file.read_text("utf-8")), "", skipped):
            yield where or "it", text, True
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        for where, text in _strings(metadata, "", ()):
            yield f"metadata {where}", text, True
    elif file.suffix == ".gguf":
        for where, text in _gguf_strings(file):
            yield where, text, where != "tokenizer.chat_template"
    else:
        yield "it", file.read_bytes().decode("utf-8", errors="replace"), False  # sentencepiece's own file is no text


def _strings(value: Any, where: str, skipped: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in skipped:
                yield f"the key {key!r}", str(key)
                yield from _strings(part, f"{where}.{key}" if where else str(key), skipped)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part, where, skipped)
    elif isinstance(value, str):
        yield where, value


def _gguf_strings(file: Path) -> Iterator[tuple[str, str]]:
    from gguf import GGUFReader, GGUFValueType

    for name, field in GGUFReader(file).fields.items():
        if GGUFValueType.STRING in field.types and name not in _VOCABULARY["gguf"]:
            content = field.contents()
            yield from ((name, one) for one in (content if isinstance(content, list) else [content]))
