"""Where a run came from and how to make it again, in words that may leave the machine: files are named, not placed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ift_peft.recipe import Recipe
from ift_peft.run_dir import RunDir
from ift_peft.yaml_source import dump_yaml

# Folders before a file's name, but not those of a URL or after another word.
_FOLDERS = re.compile(r"(?<![\w.:/\\<])(?:[A-Za-z]:[/\\]|~?/)(?:[^\s/\\'\"<>|]+[/\\])+(?=[^\s/\\'\"<>|])")


@dataclass(frozen=True)
class Public:
    """Takes the folders of this machine out of texts that the tool has written."""

    folders: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe, run: RunDir) -> Public:
        """Knows the folders that the recipe names, spaces in them included."""
        folders = {str(PurePosixPath(value).parent) for value in _strings(recipe.model_dump()) if is_absolute(value)}
        folders |= {str(parent) for parent in run.path.resolve().parents}
        return cls(tuple(sorted((folder for folder in folders if folder != "/"), key=len, reverse=True)))

    def text(self, text: str) -> str:
        for folder in self.folders:
            text = text.replace(f"{folder}/", "")
        return _FOLDERS.sub("", text)


def is_absolute(value: str) -> bool:
    """Whether a setting is the absolute path of a file or folder, rather than a text that begins with a slash."""
    if "\n" in value or len(value) > 4096:
        return False
    posix = value.startswith(("/", "~/")) and len(PurePosixPath(value).parts) > 2
    return posix or bool(PureWindowsPath(value).drive and PureWindowsPath(value).root)


def place_free(value: Any) -> Any:
    """Settings with absolute paths shortened to their last part."""
    if isinstance(value, Mapping):
        return {key: place_free(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [place_free(part) for part in value]
    if isinstance(value, str) and is_absolute(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML, without the places of its files."""
    return dump_yaml(place_free(recipe.model_dump(mode="json")))


def seeds(recipe: Recipe) -> list[tuple[str, str]]:
    """Every seed of the recipe with the name of its setting."""
    found = list(_seeds(recipe.model_dump(mode="json"), ""))
    if not any(name == "training.seed" for name, _ in found):
        found.append(("training.seed", "42 (TRL's default)"))
    return sorted(found)


def _seeds(values: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            name = f"{prefix}.{key}" if prefix else str(key)
            if key in ("seed", "data_seed") and value is not None:
                yield name, str(value)
            yield from _seeds(value, name)
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _seeds(value, f"{prefix}.{index}")


def commands(run: RunDir, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to type, with what it does, from the folder that holds the folder of runs."""
    folder = "/".join(run.path.resolve().parts[-3:])
    made = (f"ift train {folder}/recipe.yaml", "trains and measures the same again")
    if "combined" in manifest:
        made = (_combine_command(manifest, name=run.path.parent.name), "combines and measures the same again")
    found = [
        made,
        (f"ift evaluate {folder}", "measures this adapter again"),
        (f"ift predict {folder} TEXT", "asks it"),
        (f"ift merge {folder}", "writes base and adapter as one model"),
        (f"ift report {folder}", "writes this page again"),
    ]
    git = manifest.get("git")
    commit = [(f"git checkout {git['commit']}", "the working directory at the time")] if git else []
    return commit + found


def _combine_command(manifest: Mapping[str, Any], *, name: str) -> str:
    how = manifest["combined"]
    members = " ".join(f"runs/{one['run']}" for one in manifest["combined_from"])
    weights = ",".join(f"{weight:g}" for weight in how["weights"])
    given = {"density": how["density"], "rank": how["rank"], "seed": how["seed"] or None, "output-name": name}
    options = "".join(f" --{option} {value}" for option, value in given.items() if value is not None)
    return f"ift combine {members} --method {how['method']} --weights {weights}{options}"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, str):
        yield value
