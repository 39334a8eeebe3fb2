"""What is wrong with a recipe as it was written, each fault with the line it stands on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ift_peft.adapter_methods import conflicts, why_not_over
from ift_peft.errors import RecipeError
from ift_peft.recipe_files import section_of
from ift_peft.training_fields import RESERVED, fits, training_fields
from ift_peft.yaml_source import Location, YamlSource


def schema_faults(error: ValidationError, source: YamlSource, model: type[BaseModel]) -> list[RecipeError]:
    """An error for each place of `source` that does not fit the schema `model`."""
    return [_explain(item, source, model) for item in _without_union_echoes(error.errors())]


def _without_union_echoes(errors: Iterable[Any]) -> list[Any]:
    """Pydantic reports each member of a union; one line for each place is enough."""
    kept: dict[Location, Any] = {}
    for error in errors:
        location = tuple(part for part in error["loc"] if not _is_union_tag(part))
        kept.setdefault(location, {**error, "loc": location})
    return list(kept.values())


def _is_union_tag(part: str | int) -> bool:
    return isinstance(part, str) and bool(
        re.match(r"^(tuple|dict|str|int|float|constrained|function|literal|Span)\b.*", part)
    )


def _known_keys(model: Any, location: Location) -> tuple[str, ...]:
    for part in location:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return ()
        candidates = [field.annotation, *get_args(field.annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return tuple(model.model_fields) if model is not None else ()


def _explain(error: Any, source: YamlSource, model: Any) -> RecipeError:
    location: Location = error["loc"]
    dotted, where = ".".join(map(str, location)), source.where(location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        section = ".".join(map(str, location[:-1])) or "a recipe"
        return RecipeError(
            expected=f"a key of {section} ({', '.join(known)})",
            found=f"{location[-1]!r} at {where}",
            fix=f"did you mean {near[0]!r}?" if near else "remove it, or check the section it belongs to",
        )
    if error["type"] == "missing":
        return RecipeError(expected=f"{dotted} to be set", found=f"nothing in {source.name}", fix=f"add {dotted}")
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return RecipeError(
        expected=f"{dotted} to be {message}", found=f"{error['input']!r:.200} at {where}", fix=f"change {dotted}"
    )


def training_faults(training: dict[str, Any], source: YamlSource) -> Iterable[RecipeError]:
    """What of the section `training` SFTConfig does not take, or something else owns."""
    fields = training_fields()
    for key, value in training.items():
        where = source.where(("training", key))
        if key in RESERVED:
            yield RecipeError(
                expected=f"training without {key}", found=f"it at {where}", fix=f"remove it: {RESERVED[key]}"
            )
        elif key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            yield RecipeError(
                expected="a field of TRL's SFTConfig in training",
                found=f"{key!r} at {where}",
                fix=f"did you mean {near[0]!r}?" if near else "see the SFTConfig reference for the installed TRL",
            )
        elif not fits(value, fields[key]):
            yield RecipeError(
                expected=f"training.{key} to be {fields[key]}",
                found=f"{value!r} at {where}",
                fix=f"change training.{key}",
            )


def method_faults(source: YamlSource) -> Iterable[RecipeError]:
    """What the method of the adapter asks of the other sections, told also where these have faults of their own."""
    adapter, base, training = (section_of(source.values, name) for name in ("adapter", "base", "training"))
    quantization = base.get("quantization", "none")
    reason = why_not_over(adapter.get("method", "lora"), quantization)
    if reason:
        yield RecipeError(
            expected=reason,
            found=f"{quantization!r}, and {adapter['method']} at {source.where(('adapter', 'method'))}",
            fix="set base.quantization=nf4, or adapter.method=lora",
        )
    for expected, setting, fix in conflicts(adapter, training):
        found = f"{training[setting]!r} at {source.where(('training', setting))}"
        yield RecipeError(expected=expected, found=found, fix=fix)
