"""YAML with line numbers: what a recipe error needs to point at the place it came from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from ift_peft.errors import RecipeError, first_line, raise_all
from ift_peft.plain_files import NOT_TEXT, MiB, read_text

Location = tuple[str | int, ...]


LARGEST = MiB
MOST_ENTRIES = 100_000  # of a document with every alias in the place of which it stands
MOST_CHARACTERS = 4 * MiB  # of the same; they may be written once and stand there a thousand times
DEEPEST = 64


class _Loader(yaml.SafeLoader):
    """SafeLoader by YAML 1.2's rules where 1.1's surprise.

    1e-4 is a number; yes, no, on, off, 12:30 and 2024-01-31 are words, and so is what some read as a number and some
    do not: 08, 010, -.5. What cannot be made a value is a `ConstructorError` that knows its line, whatever PyYAML makes
    of it.
    """

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            if isinstance(node, yaml.ScalarNode) and (wrong := NOT_TEXT.search(node.value)):
                raise ValueError(f"{wrong[0]!a}, which no text holds")
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
            raise ConstructorError(None, None, first_line(error), node.start_mark) from None

    def construct_decimal(self, node: Any) -> int:
        return int(str(self.construct_scalar(node)).replace("_", ""), 0 if _PREFIXED.match(node.value) else 10)


_PREFIXED = re.compile(r"^[-+]?0[bx]", re.IGNORECASE)
_BOOL, _INT, _FLOAT, _TIME = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp"))
# No pattern has two ways to read the same digits: a word of a million of them is read at once.
_EXPONENT = re.compile(r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in (_BOOL, _INT, _FLOAT, _TIME)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _INT, re.compile(r"^[-+]?(?:0|[1-9][\d_]*|0b[01_]+|0x[\da-fA-F_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?(?:\d[\d_]*\.[\d_]*|\.(?:inf|Inf|INF))$|^\.(?:\d[\d_]*|nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+0123456789."))
_Loader.add_constructor(_INT, _Loader.construct_decimal)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes words of which `_Loader`, or YAML 1.1, would make something else, and names no values."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _first, _rules in _Loader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _rules:
        _Dumper.add_implicit_resolver(_tag, _pattern, [_first])


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
    """One YAML value. Raises `yaml.YAMLError`, for what is nested too deeply or repeats itself without end too."""
    return _parse(text)[1]


def dump_yaml(values: Any) -> str:
    """YAML from which `parse_value` makes the same values."""
    text: str = yaml.dump(values, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=100)
    return text


def _parse(text: str, times: int = 1) -> tuple[yaml.Node | None, Any]:
    """A document's node and value; a few lines of aliases may stand for more than memory holds, and are counted."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        _check_size(node, times)
        return node, loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError(f"more than {DEEPEST} lists and mappings inside each other") from None
    finally:
        loader.dispose()


def _check_size(root: yaml.Node, times: int) -> None:
    """Raises `ConstructorError` at the node with which a document gets too deep or, its aliases followed, too long."""
    entries, characters, left = 0, 0, [(root, 0)]
    while left:
        node, depth = left.pop()
        entries += 1
        characters += len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        for found, most, what in (
            (entries, times * MOST_ENTRIES, "entries"),
            (characters, times * MOST_CHARACTERS, "characters"),
            (depth, DEEPEST, "levels"),
        ):
            if found > most:
                told = f"more than {most:,} {what}, counting what & and * repeat"
                raise ConstructorError(None, None, told, node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            left += [(one, depth + 1) for one in node.value]
        elif isinstance(node, yaml.MappingNode):
            left += [(one, depth + 1) for pair in node.value for one in pair]


def read_yaml(path: Path, *, times: int = 1) -> YamlSource:
    """Parse a YAML file whose top level is a mapping, and which may be `times` as long as a recipe that somebody wrote.

    Raises `RecipeError` for a missing file, one that is no ordinary file or too large, bad UTF-8, bad syntax, a
    non-mapping, and (all at once) repeated keys.
    """
    try:
        text = read_text(path, most=times * LARGEST)
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
        node, values = _parse(text, times)
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
