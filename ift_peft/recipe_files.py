"""The files that a recipe names: found from the recipe's own place, and read where their content belongs in it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ift_peft.errors import IftPeftError, RecipeError, first_line, raise_all
from ift_peft.plain_files import MiB, exists, home_of, read_text
from ift_peft.sections import DATA_SUFFIXES
from ift_peft.stages import AT_ONCE, OF_ALL, TOGETHER
from ift_peft.yaml_source import LARGEST, YamlSource, parse_value

YAML_SUFFIXES = (".yaml", ".yml")
MOST_PHRASINGS = 4 * MiB  # characters of all pools together, line ends among them: `run_dir.TIMES` allows for them


def anchor_paths(values: dict[str, Any], folder: Path, *, in_file: bool) -> None:
    """Make relative paths absolute. Names of files in a recipe are always meant relative to it; what else does not
    exist, and may be a Hub id, is left for the reader to name.
    """
    for entries, key in _paths(values):
        value = entries[key]
        if value in ("tiny", "builtin"):
            continue
        path = folder / home_of(value)
        is_file_name = path.suffix.lower() in (*DATA_SUFFIXES, *YAML_SUFFIXES)
        names_file = in_file and key not in ("model", "teacher") and is_file_name
        if exists(path) or names_file:
            entries[key] = str(path.resolve())


def _paths(values: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Container and key of every entry that may name a file, those of stages among them."""
    for part in _parts(values):
        yield from _paths(part)
    base, data, evaluation = (section_of(values, name) for name in ("base", "data", "evaluation"))
    sources = [source for source in data.get("sources") or () if isinstance(source, dict)]
    perturbations = [section_of(data, "augment"), section_of(evaluation, "perturbation")]
    places: list[tuple[Any, Any]] = [(base, "model"), (data, "train"), (data, "test")]
    places += [(section_of(values, "loss"), "teacher"), (evaluation, "general_text")]
    places += [(source, key) for source in sources for key in ("train", "test")]
    places += [(section_of(evaluation, "safety"), key) for key in ("harmful", "harmless")]
    places += _pools(values)
    for section in perturbations:
        if isinstance(section.get("lexicons"), list):
            places += [(section["lexicons"], index) for index in range(len(section["lexicons"]))]
    for entries, key in places:
        if isinstance(entries.get(key) if isinstance(entries, dict) else entries[key], str):
            yield entries, key


def _parts(values: dict[str, Any]) -> list[dict[str, Any]]:
    """What the stages of a pipeline, or the parents of `merging`, have of their own."""
    pipeline = section_of(values, "pipeline")
    stages = section_of(pipeline, "stages")
    merging = section_of(values, "merging")
    parents = section_of(merging, "parents")
    parts = [section_of(section, name) for section in (stages, parents) for name in section]
    parts += [section_of(pipeline, AT_ONCE), section_of(merging, TOGETHER)]
    return [{key: part[key] for key in part if key not in OF_ALL} for part in parts if part]


def _pools(values: dict[str, Any]) -> list[tuple[Any, Any]]:
    data, evaluation = section_of(values, "data"), section_of(values, "evaluation")
    places: list[tuple[Any, Any]] = [(evaluation, "unseen_instructions")]
    places.append((section_of(evaluation, "safety"), "refusal_phrases"))
    for entries in [data, *(source for source in data.get("sources") or () if isinstance(source, dict))]:
        places += [(entries, "instructions"), (section_of(entries, "instructions"), "pool")]
    return places


def section_of(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The section of that name, empty where there is none or something else."""
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def read_pools(values: dict[str, Any], source: YamlSource) -> None:
    """Put the phrasings of a file in the place of its name, so that a run records them.

    Raises `Faults` holding a `RecipeError` for every file that cannot be read, and with which they get too long for a
    run to be opened again.
    """
    faults: list[IftPeftError] = []
    characters = 0
    for entries, key in [pool for part in (values, *_parts(values)) for pool in _pools(part)]:
        name = entries.get(key)
        if not isinstance(name, str):
            continue
        try:
            text = read_text(Path(name), most=LARGEST)
            characters += len(text)
            if characters > MOST_PHRASINGS:
                raise OSError(errno.EFBIG, f"more than {MOST_PHRASINGS // MiB} MiB of phrasings in all", name)
            is_yaml = Path(name).suffix.lower() in YAML_SUFFIXES
            entries[key] = (
                (parse_value(text) or []) if is_yaml else [line.strip() for line in text.split("\n") if line.strip()]
            )
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            faults.append(
                RecipeError(
                    expected=f"{key} to be a list, or a file of one phrasing a line or of YAML",
                    found=f"{first_line(error)} ({name}, in {source.name})",
                    fix="check the path; a recipe's is relative to its file, an override's to the working directory",
                )
            )
    raise_all(faults)
