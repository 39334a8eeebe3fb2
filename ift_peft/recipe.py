"""The recipe: the only input of a run. YAML in, frozen models out; every fault is named at once. Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ift_peft.errors import IftPeftError, RecipeError, raise_all
from ift_peft.training_fields import RESERVED, fits, training_fields
from ift_peft.yaml_source import Location, YamlSource, read_yaml

Quantization = Literal["none", "int8", "nf4", "fp4"]
Format = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "columns"]
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class Base(Section):
    model: str = "tiny"
    """`tiny`, a folder in Hugging Face format, or a Hub id."""
    revision: str | None = None
    """Commit, tag or branch of a Hub id."""
    quantization: Quantization = "none"
    double_quantization: bool = True
    """Quantise the scales of nf4 and fp4 as well (QLoRA, arXiv:2305.14314)."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: float32 on CPU, bfloat16 on a GPU that has it, else float16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Adapter(Section):
    method: Literal["lora"] = "lora"
    r: Count = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear`, a list of module name endings, or a regular expression on full module names."""
    embeddings: bool = False
    """Adapt the input embedding as well: for small bases, whose embeddings lack distinctions that the task needs."""
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False

    @field_validator("target_modules", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Columns(Section):
    """Which columns of a table hold what: by name, or by number (from 0) in files without a header."""

    text: str | int = "text"
    label: str | int | None = None
    answer: str | int | None = None


class Data(Section):
    train: str
    """A file, a folder, or a Hub id."""
    test: str | None = None
    """Held-out rows; without it, `test_size` of the training rows are set aside."""
    test_size: Fraction | Count = 0.2
    train_split: str = "train"
    """Split to take of a Hub id."""
    test_split: str = "test"
    seed: int = 0
    max_train_rows: Count | None = None
    """Take this many training rows, drawn with `seed`."""
    max_test_rows: Count | None = None
    format: Format = "auto"
    columns: Columns = Columns()
    header: bool = True
    """Whether CSV and TSV files name their columns in the first line."""
    system: str | None = None
    instruction: str | None = None
    """Asked of every row; `{text}` marks where the text goes, else it follows on a new line."""
    labels: tuple[str, ...] | dict[str, str] | None = None
    """The classes. A list also reads the integers 0, 1, … as positions in it; a mapping renames stored values."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """A row over `training.max_length`: cut its longest user text, leave it out, or stop. Answers are never cut."""

    @field_validator("labels", mode="before")
    @classmethod
    def _label_words(cls, value: Any) -> Any:
        words = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if any(word is None or isinstance(word, bool) for word in words):
            raise ValueError("words; quote null, true and false")
        if isinstance(value, dict):
            return {str(stored): str(word) for stored, word in value.items()}
        return tuple(str(word) for word in value) if isinstance(value, list) else value

    @field_validator("labels")
    @classmethod
    def _at_least_two_labels(cls, value: tuple[str, ...] | dict[str, str] | None) -> Any:
        if value is None:
            return value
        words = list(value.values()) if isinstance(value, dict) else list(value)
        if len(set(words)) < 2 or not all(word.strip() for word in words):
            raise ValueError("at least two different, non-empty words")
        if isinstance(value, tuple) and len(set(words)) != len(words):
            raise ValueError("words that are each listed once")
        return value

    @property
    def label_words(self) -> tuple[str, ...]:
        """The classes in order, each once; empty where the task is not classification."""
        if self.labels is None:
            return ()
        words = self.labels.values() if isinstance(self.labels, dict) else self.labels
        return tuple(dict.fromkeys(words))


class Evaluation(Section):
    per_device_eval_batch_size: Count = 32
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    confidence: Fraction = 0.95
    seed: int = 0


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    base: Base = Base()
    adapter: Adapter = Adapter()
    data: Data
    training: dict[str, Any] = {}
    """Passed through to TRL's `SFTConfig` under its own names; what is refused is in docs/architecture.md."""
    evaluation: Evaluation = Evaluation()

    @field_validator("training", mode="before")
    @classmethod
    def _nothing_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value


def recipes_root() -> Path:
    """The folder of the shipped recipes: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Recipe name to file, for every recipe that ships."""
    return {path.stem: path for path in sorted(recipes_root().rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe's name, or of a path to a YAML file. Raises `RecipeError` with the nearest name."""
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    near = difflib.get_close_matches(name, shipped, n=1)
    raise RecipeError(
        expected=f"a recipe name ({', '.join(shipped)}) or a .yaml file",
        found=repr(name),
        fix=f"did you mean {near[0]!r}?" if near else "list them with: ift recipes",
    )


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a shipped name or a YAML file, with `section.key=value` overrides applied.

    Paths in the file are taken relative to it, paths in overrides relative to the working directory.
    Raises `RecipeError`, or `Faults` holding one for every fault.
    """
    path = find_recipe(name)
    source = read_yaml(path)
    source.values.setdefault("name", path.stem)
    _anchor_paths(source.values, path.resolve().parent, in_file=True)
    for override in overrides:
        source.override(override)
    _anchor_paths(source.values, Path.cwd(), in_file=False)
    return validate(source)


def _anchor_paths(values: dict[str, Any], folder: Path, *, in_file: bool) -> None:
    """Make relative paths absolute. Names of data files in a recipe are always meant relative to it; what else does
    not exist, and may be a Hub id, is left for the reader to name.
    """
    for section, keys in (("data", ("train", "test")), ("base", ("model",))):
        entries = values.get(section)
        if not isinstance(entries, dict):
            continue
        for key in keys:
            value = entries.get(key)
            if not isinstance(value, str) or value == "tiny":
                continue
            path = folder / Path(value).expanduser()
            names_file = in_file and section == "data" and path.suffix.lower() in DATA_SUFFIXES
            if path.exists() or names_file:
                entries[key] = str(path.resolve())


def validate(source: YamlSource) -> Recipe:
    """A `Recipe` of parsed YAML. Raises `Faults` holding a `RecipeError` for every fault."""
    faults: list[IftPeftError] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(source.values)
    except ValidationError as error:
        faults.extend(_explain(item, source) for item in _without_union_echoes(error.errors()))
    training = source.values.get("training")
    if isinstance(training, dict):
        faults.extend(_training_faults(training, source))
    raise_all(faults)
    assert recipe is not None
    return recipe


def _without_union_echoes(errors: Iterable[Any]) -> list[Any]:
    """Pydantic reports each member of a union; one line for each place is enough."""
    kept: dict[Location, Any] = {}
    for error in errors:
        location = tuple(part for part in error["loc"] if not _is_union_tag(part))
        kept.setdefault(location, {**error, "loc": location})
    return list(kept.values())


def _is_union_tag(part: str | int) -> bool:
    return isinstance(part, str) and bool(
        re.match(r"^(tuple|dict|str|int|float|constrained|function|literal)\b.*", part)
    )


def _known_keys(location: Location) -> tuple[str, ...]:
    model: Any = Recipe
    for part in location:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return ()
        candidates = [field.annotation, *get_args(field.annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return tuple(model.model_fields) if model is not None else ()


def _explain(error: Any, source: YamlSource) -> RecipeError:
    location: Location = error["loc"]
    dotted, where = ".".join(map(str, location)), source.where(location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
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
        expected=f"{dotted} to be {message}", found=f"{error['input']!r} at {where}", fix=f"change {dotted}"
    )


def _training_faults(training: dict[str, Any], source: YamlSource) -> Iterable[RecipeError]:
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


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), allow_unicode=True, sort_keys=False, width=100)
