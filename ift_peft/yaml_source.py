"""YAML with line numbers: what a recipe error needs to point at the place it came from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ift_peft.errors import RecipeError, raise_all

Location = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader by YAML 1.2's rules where 1.1's surprise: 1e-4 is a number, and yes, no, on, off are words."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != _BOOL]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


@dataclass
class YamlSource:
    """A parsed document: `values`, and for each path into them the place it was written."""

    name: str
    values: dict[str, Any]
    lines: dict[Location, str] = field(default_factory=dict)

    def where(self, location: Location) -> str:
        """The place of the nearest enclosing entry of `location`, as `file:line` or the override's text."""
        for length in range(len(location), 0, -1):
            if location[:length] in self.lines:
                return self.lines[location[:length]]
        return self.name

    def over(self, below: YamlSource) -> YamlSource:
        """This document laid over another: mappings are merged, everything else replaces; names come from this one."""
        lines = dict(below.lines)
        merged = laid_over(below.values, self.values)
        merged["name"] = self.values.get("name", Path(self.name).stem)
        return YamlSource(self.name, merged, {**lines, **self.lines})

    def override(self, assignment: str) -> None:
        """Apply one `section.key=value`; the value is read as YAML, so `[a,b]`, `1e-4` and `true` work.

        Raises `RecipeError` where the text has no `=` or the value is not YAML.
        """
        path, separator, text = assignment.partition("=")
        keys = tuple(path.strip().split("."))
        if not separator or not all(keys):
            raise RecipeError(
                expected="an override of the form section.key=value",
                found=repr(assignment),
                fix="write it like training.learning_rate=1e-4, without spaces around =",
            )
        try:
            value = parse_value(text)
        except yaml.YAMLError as error:
            raise RecipeError(
                expected="a YAML value after =", found=f"{assignment!r} ({error})", fix="quote the value"
            ) from None
        target = self.values
        for depth, key in enumerate(keys[:-1], start=1):
            if not isinstance(target.get(key), dict):
                target[key] = {}
                self.lines[keys[:depth]] = f"override {assignment!r}"
            target = target[key]
        target[keys[-1]] = value
        self.lines = {where: line for where, line in self.lines.items() if where[: len(keys)] != keys}
        self.lines[keys] = f"override {assignment!r}"


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` with `above` over it: mappings are merged, everything else replaces."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = laid_over(merged[key], value) if both else value
    return merged


def parse_value(text: str) -> Any:
    """One YAML value."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass


def read_yaml(path: Path) -> YamlSource:
    """Parse a YAML file whose top level is a mapping.

    Raises `RecipeError` for a missing file, bad UTF-8, bad syntax, a non-mapping, and (all at once) repeated keys.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(
            expected=f"a readable recipe at {path}", found=error.strerror or str(error), fix="check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            expected=f"{path} in UTF-8",
            found=f"byte {error.object[error.start]:#04x} at offset {error.start}",
            fix="save the file as UTF-8",
        ) from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)  # noqa: S506
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(
            expected="valid YAML",
            found=f"{getattr(error, 'problem', error)} at {place}",
            fix="check indentation, colons and quotes there",
        ) from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            expected=f"{path} to hold sections such as base:, data:, training:",
            found="an empty file" if node is None else "a list or a single value",
            fix="start from a shipped recipe: ift recipes --show sentiment",
        )
    source = YamlSource(name=str(path), values=values)
    repeated: list[RecipeError] = []
    _note_lines(node, (), source, repeated)
    raise_all(repeated)
    return source


def _note_lines(node: yaml.Node, location: Location, source: YamlSource, repeated: list[RecipeError]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*location, key.value)
            if inner in source.lines:
                repeated.append(
                    RecipeError(
                        expected=f"each key once in {'.'.join(map(str, location)) or 'the recipe'}",
                        found=f"{key.value!r} at {source.lines[inner]} and again at line {key.start_mark.line + 1}",
                        fix="keep one of them",
                    )
                )
            source.lines[inner] = f"{source.name}:{key.start_mark.line + 1}"
            _note_lines(value, inner, source, repeated)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            source.lines[(*location, index)] = f"{source.name}:{value.start_mark.line + 1}"
            _note_lines(value, (*location, index), source, repeated)
