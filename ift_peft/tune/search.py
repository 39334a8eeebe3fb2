"""What is searched: settings of a recipe by their dotted path, checked before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial
from trl import SFTConfig

from ift_peft.errors import Faults, IftPeftError, RecipeError, raise_all
from ift_peft.model.base import choose_device, choose_dtype
from ift_peft.recipe import Recipe, validate
from ift_peft.selection import Setting, Span
from ift_peft.train.arguments import CHECKPOINTING, CHECKPOINTING_NAMES, arguments_of
from ift_peft.yaml_source import YamlSource

Settings = dict[str, Any]
Search = Mapping[str, Setting]
# Trials are compared by the validation rows and how they are measured; these decide both.
FIXED = ("name", "description", "validation", "evaluation", "tune")
# Of data, what leaves it to the same rows to be learnt and validated on.
SAME_ROWS = ("instruction", "instructions", "system", "augment")
RANKS = (4, 8, 16, 32)


def default_search(recipe: Recipe) -> dict[str, Setting]:
    """Learning rate from a tenth to ten times the recipe's own, r of the adapter, and epochs up to twice its own."""
    own = own_settings(recipe, ("training.learning_rate", "training.num_train_epochs"))
    rate = float(own["training.learning_rate"])
    search: dict[str, Setting] = {
        "training.learning_rate": Span(low=rate / 10, high=rate * 10, log=True),
    }
    if recipe.adapter.method != "ia3":  # it has no rank
        search["adapter.r"] = tuple(sorted({*RANKS, recipe.adapter.r}))
    epochs = float(own["training.num_train_epochs"])
    if int(recipe.training.get("max_steps", -1)) <= 0 and epochs.is_integer():
        search["training.num_train_epochs"] = Span(low=1, high=max(2, 2 * int(epochs)), integer=True)
    return search


def own_settings(recipe: Recipe, paths: Sequence[str], *, max_length: int | None = None) -> Settings:
    """The recipe's own value of each setting; None where it has none.

    Where it leaves a field of `training` unset, that is what it would be trained with, by SFTConfig's defaults and
    ours. `max_length` is what the base makes of that one. Raises `RecipeError` for values that SFTConfig refuses.
    """
    device = choose_device(recipe.base.device)
    config = arguments_of(
        recipe,
        output_dir=Path(),
        device=device,
        compute_dtype=choose_dtype(recipe.base.compute_dtype, device),
        max_length=max_length,
    )
    values = recipe.model_dump(mode="json")
    return {path: _own_value(values, path, config) for path in paths}


def _own_value(values: dict[str, Any], path: str, config: SFTConfig) -> Any:
    value: Any = values
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    section, _, name = path.partition(".")
    if section == "training" and name not in values[section]:
        value = getattr(config, CHECKPOINTING if name in CHECKPOINTING_NAMES else name, None)
        value = value.value if isinstance(value, Enum) else value
    return value


def check_search(recipe: Recipe, search: Search) -> None:
    """Raises `RecipeError`, or `Faults` holding one for each setting that a recipe does not have or does not take."""
    faults: list[IftPeftError] = []
    for path, setting in search.items():
        reason = _not_comparable(recipe, path)
        if reason is not None:
            faults.append(
                RecipeError(
                    expected=f"tune.search over settings that leave {reason}",
                    found=path,
                    fix="remove it, and set it in the recipe",
                )
            )
            continue
        told: dict[str, IftPeftError] = {}
        for value in _ends(setting) if isinstance(setting, Span) else setting:
            try:
                with_settings(recipe, {path: value})
            except Faults as error:
                told |= {str(fault): fault for fault in error.faults}
            except RecipeError as error:
                told[str(error)] = error
        faults += told.values()
    raise_all(faults)


def _not_comparable(recipe: Recipe, path: str) -> str | None:
    """What a setting would change, so that scores of trials could not be compared; None where they can."""
    section, _, rest = path.partition(".")
    name = rest.split(".")[0]
    if section in FIXED:
        return "the validation rows and their measuring alone"
    if section == "data" and name not in SAME_ROWS:
        return f"the rows as they are: of data, {', '.join(SAME_ROWS)}"
    if path == "training.max_length" and recipe.data.overlong == "drop":
        return "the rows as they are: with data.overlong=drop it decides which are too long"
    if section == "base" and name in ("model", "revision") and not recipe.data.label_words:
        return "the tokens as they are: the loss is in nats for each, and another base has others"
    return None


def _ends(span: Span) -> tuple[float, float]:
    return (int(span.low), int(span.high)) if span.integer else (span.low, span.high)


def with_settings(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with `settings` by dotted path, validated, without `tune`. Raises `RecipeError` or `Faults`."""
    values = copy.deepcopy(recipe.model_dump(mode="json"))
    values["tune"] = None
    source = YamlSource("the recipe", values)
    for path, value in settings.items():
        *parents, last = path.split(".")
        section: Any = values
        for key in parents:
            if section.get(key) is None:
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                raise RecipeError(
                    expected="tune.search of settings by their dotted path, such as training.learning_rate",
                    found=f"{path}, where {key} is no section",
                    fix="change the path",
                )
        section[last] = value
        for length in range(1, len(parents) + 2):
            source.lines.setdefault(tuple(path.split(".")[:length]), f"tune.search: {path}")
    return validate(source)


def distributions(search: Search) -> dict[str, BaseDistribution]:
    """The search as Optuna's distributions."""
    found: dict[str, BaseDistribution] = {}
    for path, setting in search.items():
        if not isinstance(setting, Span):
            found[path] = CategoricalDistribution(setting)
        elif setting.integer:
            found[path] = IntDistribution(int(setting.low), int(setting.high), log=setting.log)
        else:
            found[path] = FloatDistribution(setting.low, setting.high, log=setting.log)
    return found


def within(settings: Settings, space: Mapping[str, BaseDistribution]) -> bool:
    """Whether every one of `settings` is among the values that are searched."""
    return all(_among(settings[path], distribution) for path, distribution in space.items())


def _among(value: Any, distribution: BaseDistribution) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return any(value == choice and type(value) is type(choice) for choice in distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    whole = isinstance(distribution, FloatDistribution) or float(value).is_integer()
    return whole and distribution.low <= value <= distribution.high


def suggested(trial: Trial, path: str, one: BaseDistribution) -> Any:
    """The trial's value of a setting; one that it has from before a restart stays."""
    if isinstance(one, CategoricalDistribution):
        return trial.suggest_categorical(path, one.choices)
    if isinstance(one, IntDistribution):
        return trial.suggest_int(path, one.low, one.high, log=one.log)
    assert isinstance(one, FloatDistribution)
    return trial.suggest_float(path, one.low, one.high, log=one.log)
