"""From a request to the recipe that its trainer is given: ours, with what the client may say of it laid over."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ift_peft.errors import Faults, IftPeftError, RecipeError, raise_all
from ift_peft.recipe import validate
from ift_peft.sections import Adapter
from ift_peft.selection import Validation
from ift_peft.serve.jobs.auto import Defaults, defaults_of, resolve
from ift_peft.serve.jobs.folder import TRAINING_FILE, VALIDATION_FILE
from ift_peft.serve.objects import MOST_MULTIPLIER, Hyperparameters
from ift_peft.yaml_source import YamlSource, laid_over

HELD_OUT = 0.1  # of the rows, where there is no validation file; at least one
MOST_LOGGED = 1000  # lines of metrics of a job, about
MOST_STEPS = 100_000_000  # more than a machine takes
CHECKPOINTS = 3  # that stay, as OpenAI keeps them

_TRAINING = {
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_steps", "max_length", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "neftune_noise_alpha", "data_seed"),
    *("train_sampling_strategy", "activation_checkpointing", "gradient_checkpointing"),
}
_OWNED = {
    "num_train_epochs": "hyperparameters.n_epochs",
    "per_device_train_batch_size": "hyperparameters.batch_size",
    "seed": "seed",
}
_LOSS = {"kl_to_base", "kl_direction", "temperature", "label_smoothing", "chunk"}
_DATA = {
    *("system", "instruction", "instructions", "labels", "format", "columns", "records", "seed", "test_size"),
    *("max_train_rows", "max_test_rows", "overlong", "quality", "augment"),
}
_EVALUATION = {
    *("forgetting", "safety", "metrics", "max_new_tokens", "target", "unseen_instructions", "max_unseen_rows"),
    *("perturbation", "temperature", "per_device_eval_batch_size", "bootstrap_samples", "confidence", "seed"),
}
ALLOWED: dict[str, set[str]] = {
    "base": {"quantization", "double_quantization", "compute_dtype"},
    "adapter": set(Adapter.model_fields),
    "training": _TRAINING,
    "loss": _LOSS,
    "data": _DATA,
    "evaluation": _EVALUATION,
    "validation": set(Validation.model_fields),
}
"""Sections and keys of a recipe that a client may set: none names a file, a folder or a URL, or runs code."""


NAME_ENDING = re.compile(r"[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Planned:
    """What a job will be: the recipe's values as written, and its hyperparameters with a number for each "auto"."""

    values: dict[str, Any]
    hyperparameters: Hyperparameters


def plan(
    *,
    name: str,
    base: str,
    device: str,
    seed: int,
    given: Hyperparameters,
    above: dict[str, Any],
    rows: int,
    tested: bool,
) -> Planned:
    """The recipe of the job `name`, with `rows` rows in its training file, and `tested` by a validation file.

    It says what the files are called in the job's folder, and not where that lies: the data folder may be moved.
    `base` is what `base.model` says; `above` is laid over. Raises a `RecipeError`, or `Faults` holding one for every
    fault.
    """
    faults: list[IftPeftError] = [*_forbidden(above), *_said_twice(above, given)]
    kept = {
        section: {key: value for key, value in own.items() if key in ALLOWED[section]}
        for section, own in above.items()
        if section in ALLOWED and isinstance(own, dict)
    }
    left = _rows_left(rows, kept, tested=tested)
    found = resolve(given, left)
    defaults = defaults_of(base)
    held_out = {"test": VALIDATION_FILE} if tested else {"test_size": max(1, int(rows * HELD_OUT))}
    ours = {
        "name": name,
        "base": {"model": base, "device": device},
        "adapter": _own_adapter(defaults, kept),
        "data": {"train": TRAINING_FILE, **held_out},
        "training": _own_training(found, defaults, seed=seed),
    }
    values = laid_over(ours, kept)
    try:
        values["training"]["logging_steps"] = max(1, _steps(values["training"], left) // MOST_LOGGED)
        validate(YamlSource("recipe", {**values, **{key: own for key, own in above.items() if not _is_section(key)}}))
    except IftPeftError as error:
        faults += error.faults if isinstance(error, Faults) else [error]
    steps = values["training"].get("max_steps", -1)
    if isinstance(steps, int) and steps > MOST_STEPS:
        expected = f"recipe.training.max_steps of at most {MOST_STEPS:,}"
        faults.append(RecipeError(expected=expected, found=f"{steps!r:.100}", fix="change it, or leave it out"))
    shown: dict[str, Any] = {}
    if "learning_rate" in kept.get("training", {}):
        shown["learning_rate_multiplier"] = _multiplier(values["training"]["learning_rate"], defaults, faults)
    raise_all(faults)
    if values["training"].get("max_steps", -1) > 0:
        shown["n_epochs"] = given.n_epochs  # steps decide: there is no number for an "auto"
    return Planned(values, found.model_copy(update=shown))


def _own_adapter(defaults: Defaults, kept: dict[str, Any]) -> dict[str, Any]:
    if kept.get("adapter", {}).get("method", "lora") != "lora":
        return {"target_modules": "all-linear"}  # what lora is set to is not another method's
    return dict(defaults.adapter)


def _own_training(found: Hyperparameters, defaults: Defaults, *, seed: int) -> dict[str, Any]:
    assert not isinstance(found.learning_rate_multiplier, str)
    return {
        "num_train_epochs": found.n_epochs,
        "per_device_train_batch_size": found.batch_size,
        "learning_rate": defaults.learning_rate * found.learning_rate_multiplier,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "seed": seed,
        "save_total_limit": CHECKPOINTS,
    }


def _multiplier(rate: Any, defaults: Defaults, faults: list[IftPeftError]) -> float | None:
    """A learning rate as a job shows it; a fault where a job could not."""
    is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
    if is_number and 0 < rate <= MOST_MULTIPLIER * defaults.learning_rate:
        return float(rate / defaults.learning_rate)
    expected = f"recipe.training.learning_rate above 0, and at most {MOST_MULTIPLIER * defaults.learning_rate:g}"
    faults.append(RecipeError(expected=expected, found=f"{rate!r:.100}", fix="change it, or leave it out"))
    return None


def _is_section(key: str) -> bool:
    """Whether a section is named, allowed or not: those that are not are told by `_forbidden` alone."""
    return key in ALLOWED or key in ("name", "description", "tune", "pipeline", "merging", "extends")


def _forbidden(above: dict[str, Any]) -> Iterator[RecipeError]:
    """What a client may not set, whatever the schema says of it."""
    for section, own in above.items():
        if section not in ALLOWED:
            if _is_section(section):
                yield _refused(section, "leave it out: a job trains one adapter on its training file")
            continue
        if not isinstance(own, dict):
            yield RecipeError(
                expected=f"recipe.{section} to be an object", found=f"{own!r:.100}", fix="see docs/service"
            )
            continue
        for key in own:
            if section == "training" and key in _OWNED:
                yield _refused(f"training.{key}", f"set {_OWNED[key]}")
            elif key not in ALLOWED[section]:
                yield _refused(f"{section}.{key}", f"it may set: {', '.join(sorted(ALLOWED[section]))}")
    yield from _hidden_files(above)
    if isinstance(above.get("adapter"), dict):
        yield from _expressions(above["adapter"])


def _hidden_files(above: dict[str, Any]) -> Iterator[RecipeError]:
    """Settings that may name a file, or run code, inside sections that are allowed."""
    data, evaluation = (own if isinstance(own, dict) else {} for own in (above.get("data"), above.get("evaluation")))
    for where, section in (
        ("data.augment", data.get("augment")),
        ("evaluation.perturbation", evaluation.get("perturbation")),
    ):
        if isinstance(section, dict) and "lexicons" in section:
            yield _refused(f"{where}.lexicons", "leave it out: the built-in one is used")
    for where, pool in (
        ("data.instructions", data.get("instructions")),
        ("evaluation.unseen_instructions", evaluation.get("unseen_instructions")),
    ):
        inner = pool.get("pool") if isinstance(pool, dict) else None
        if isinstance(pool, str) or isinstance(inner, str):
            yield _refused(f"{where} as the name of a file", "write the phrasings as a list")
    if evaluation.get("safety") not in (None, True, False):
        yield _refused(
            "evaluation.safety other than true and false", "write true: the prompts that come along are asked"
        )
    metrics = evaluation.get("metrics")
    if isinstance(metrics, list | tuple) and "pass_at_k" in metrics:
        yield _refused(
            "evaluation.metrics with pass_at_k", "leave it out: a service runs no program that a model wrote"
        )


def _expressions(adapter: dict[str, Any]) -> Iterator[RecipeError]:
    """What PEFT matches with names of modules as regular expressions, of which one may take for ever."""
    if isinstance(adapter.get("target_modules"), str) and adapter["target_modules"] != "all-linear":
        fix = "write all-linear, or a list of name endings"
        yield _refused("adapter.target_modules as a regular expression", fix)
    for name in ("target_modules", "modules_to_save", "feedforward_modules", "rank_pattern", "alpha_pattern"):
        given = adapter.get(name)
        endings = given if isinstance(given, list | tuple | dict) else ()
        if not all(isinstance(one, str) and NAME_ENDING.fullmatch(one) for one in endings):
            what = "name endings as keys" if isinstance(given, dict) else "a list of name endings"
            yield _refused(f"adapter.{name} with a regular expression", f"write {what}: letters, digits, _, - and .")


def _said_twice(above: dict[str, Any], given: Hyperparameters) -> Iterator[RecipeError]:
    training = above.get("training")
    if isinstance(training, dict) and "learning_rate" in training and given.learning_rate_multiplier != "auto":
        yield RecipeError(
            expected="either learning_rate_multiplier or recipe.training.learning_rate",
            found="both",
            fix="remove one of them",
        )


def _refused(what: str, fix: str) -> RecipeError:
    return RecipeError(expected="settings of a recipe that a client may make", found=f"recipe.{what}", fix=fix)


def _rows_left(rows: int, kept: dict[str, Any], *, tested: bool) -> int:
    """Rows to train on: without those held out and set aside, as far as it is known before they are read."""
    data = kept.get("data", {})
    if not tested:
        rows -= _part(data.get("test_size", HELD_OUT), rows)
    limit = data.get("max_train_rows")
    rows = min(rows, limit) if isinstance(limit, int) and limit > 0 else rows
    if "validation" in kept:
        rows -= _part(kept["validation"].get("size", HELD_OUT), rows)
    return max(1, rows)


def _part(size: Any, rows: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int | float) or size <= 0:
        return 0  # told as a fault of the recipe
    return max(1, int(size * rows)) if size < 1 else int(min(size, rows))


def _steps(training: dict[str, Any], rows: int) -> int:
    """About how many steps there will be; settings that are no numbers are told as faults of the recipe."""
    steps, accumulated = training.get("max_steps"), training.get("gradient_accumulation_steps", 1)
    if isinstance(steps, int) and steps > 0:
        return steps
    batch: int = training["per_device_train_batch_size"] * (accumulated if isinstance(accumulated, int) else 1)
    epochs: int = training["num_train_epochs"]
    return math.ceil(rows / max(1, batch)) * epochs
