"""The recipe: the only input of a run. YAML in, frozen models out; every fault is named at once. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from ift_peft.adapter_methods import COMBINES
from ift_peft.errors import Faults, IftPeftError, RecipeError, raise_all
from ift_peft.plain_files import NOT_TEXT, is_file
from ift_peft.recipe_faults import method_faults, schema_faults, training_faults
from ift_peft.recipe_files import YAML_SUFFIXES, anchor_paths, read_pools
from ift_peft.sections import Adapter, Base, Data, Evaluation, Loss, Section
from ift_peft.selection import Tune, Validation
from ift_peft.stages import AT_ONCE, OF_ALL, TOGETHER, Merging, Pipeline, fields_of, holes, in_order
from ift_peft.yaml_source import Location, YamlSource, dump_yaml, laid_over, read_yaml


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
    description: str = ""
    base: Base = Base()
    adapter: Adapter = Adapter()
    data: Data
    loss: Loss = Loss()
    training: dict[str, Any] = Field(default_factory=dict)
    """Passed through to TRL's `SFTConfig` under its own names; what is refused is in docs/architecture.md."""
    validation: Validation | None = None
    evaluation: Evaluation = Evaluation()
    tune: Tune | None = None
    pipeline: Pipeline | None = None
    """Stages with an adapter each, over what the other sections say."""
    merging: Merging | None = None
    """Several adapters that are combined, likewise."""

    @property
    def seed(self) -> int:
        """That of the training; TRL's default is 42."""
        return int(self.training.get("seed", 42))

    def with_seed(self, step: int) -> Recipe:
        """This recipe with the seed of its training `step` further."""
        return self.model_copy(update={"training": {**self.training, "seed": self.seed + step}})

    @model_validator(mode="before")
    @classmethod
    def _without_forgetting(cls, values: Any) -> Any:
        """A classifier has no language-model head whose loss on general text could be measured."""
        base = values.get("base") if isinstance(values, dict) else None
        if isinstance(base, dict) and base.get("head") == "sequence-classification":
            evaluation = values.get("evaluation")
            if evaluation is None or isinstance(evaluation, dict):
                return {**values, "evaluation": {"forgetting": False, **(evaluation or {})}}
        return values

    @model_validator(mode="after")
    def _fits_its_head(self) -> Self:
        if self.base.head == "causal-lm":
            return self
        faults = []
        if not self.data.label_words:
            faults.append("data.labels to be set")
        if self.loss.kind != "cross_entropy" or self.loss.kl_to_base or self.loss.chunk:
            faults.append("of loss only label_smoothing to be set")
        if self.evaluation.forgetting:
            faults.append("no evaluation.forgetting, which needs a language-model head")
        if self.evaluation.safety is not None:
            faults.append("no evaluation.safety, which needs answers in words")
        if faults:
            raise ValueError(f"with base.head sequence-classification, {'; '.join(faults)}")
        return self

    @field_validator("training", mode="before")
    @classmethod
    def _nothing_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value


def require_one_task(recipe: Recipe, *, by: str) -> None:
    """Raises `RecipeError` for a recipe of several adapters, which `by` does not take."""
    several = "pipeline" if recipe.pipeline is not None else "merging"
    if recipe.pipeline is not None or recipe.merging is not None:
        raise RecipeError(
            expected=f"the recipe of one task for {by}",
            found=f"{recipe.name}, a recipe with {several}",
            fix="ift train takes it; for the others write the part as a recipe of its own",
        )


def recipes_root() -> Path:
    """The folder of the shipped recipes: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Recipe name to file, for every recipe that ships."""
    root = recipes_root()
    return {path.stem: path for path in sorted(root.rglob("*.yaml")) if path.relative_to(root).parts[0] != "data"}


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe's name, or of a path to a YAML file. Raises `RecipeError` with the nearest name."""
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if path.suffix in YAML_SUFFIXES or is_file(path):
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
    source = _read(path, extended=())
    source.values.setdefault("name", path.stem)
    for override in overrides:
        source.override(override)
    anchor_paths(source.values, Path.cwd(), in_file=False)
    read_pools(source.values, source)
    return validate(source)


def _read(path: Path, *, extended: tuple[Path, ...]) -> YamlSource:
    """The YAML of `path` laid over the recipe that it `extends`, if any, with paths made absolute."""
    source = read_yaml(path)
    anchor_paths(source.values, path.resolve().parent, in_file=True)
    parent = source.values.pop("extends", None)
    if parent is None:
        return source
    chain = (*extended, path.resolve())
    beside = path.parent / str(parent)
    below = find_recipe(str(beside) if is_file(beside) else str(parent))
    if below.resolve() in chain:
        raise RecipeError(
            expected="recipes that end in one that extends none", found=f"{parent!r} at {path} again", fix="break it"
        )
    return source.over(_read(below, extended=chain))


def validate(source: YamlSource) -> Recipe:
    """A `Recipe` of parsed YAML. Raises `Faults` holding a `RecipeError` for every fault."""
    faults: list[IftPeftError] = list(_text_faults(source.values, (), source))
    raise_all(faults)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(source.values)
    except ValidationError as error:
        faults.extend(schema_faults(error, source, Recipe))
    training = source.values.get("training")
    if isinstance(training, dict):
        faults.extend(training_faults(training, source))
    if recipe is not None and recipe.adapter.bias != "none":
        faults.append(_base_is_lost(recipe, source))
    faults.extend(method_faults(source))
    if recipe is not None and recipe.validation is not None:
        faults.extend(_validation_faults(recipe, recipe.validation, source))
    if recipe is not None and not faults:
        faults.extend(_faults_of_parts(recipe, source))
    raise_all(faults)
    assert recipe is not None
    return recipe


def _text_faults(value: Any, location: Location, source: YamlSource) -> Iterable[RecipeError]:
    """Words that cannot be written down again, as paths of files whose names are not in UTF-8."""
    if isinstance(value, str) and (wrong := NOT_TEXT.search(value)):
        yield RecipeError(
            expected=f"{'.'.join(map(str, location))} in characters that UTF-8 has",
            found=f"{wrong[0]!a} in {value!a:.200} at {source.where(location)}",
            fix="rename the file or folder" if "udc" in ascii(wrong[0]) else "repair the text",
        )
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in entries:
        yield from _text_faults(inner, (*location, key), source)


def stage_recipes(recipe: Recipe, source: YamlSource | None = None) -> dict[str, Recipe]:
    """The recipe of each stage of a pipeline, in an order in which they can run, and last that of `at_once`, if any.

    Each is the pipeline's own with what the stage has of its own over it, called <pipeline>.<stage>. `source` is where
    the recipe was written. Raises `RecipeError` or `Faults`, and `ValueError` where stages wait for each other.
    """
    assert recipe.pipeline is not None
    pipeline = recipe.pipeline
    parts = {**pipeline.stages, **({} if pipeline.at_once is None else {AT_ONCE: pipeline.at_once})}
    sources = {}
    for name, part in parts.items():
        place = ("pipeline", *(("stages", name) if name in pipeline.stages else (AT_ONCE,)))
        own = _part_source(recipe, source, name, part, place=place)
        data = own.values["data"] if isinstance(own.values.get("data"), dict) else {}
        columns = data.get("columns")
        if isinstance(columns, dict) and columns.get("answer") is None and columns.get("label") is None:
            what = "answer" if data.get("labels") is None else "label"
            columns[what] = name if name in pipeline.stages else pipeline.document
        sources[name] = own
    found = _validate_all(sources)
    order = in_order({name: str(found[name].data.columns.text) for name in pipeline.stages})
    return {name: found[name] for name in (*order, *([AT_ONCE] if AT_ONCE in parts else []))}


def parent_recipes(recipe: Recipe, source: YamlSource | None = None) -> dict[str, Recipe]:
    """The recipe of each parent in `merging`, as those of stages are made. Raises `RecipeError` or `Faults`."""
    assert recipe.merging is not None
    sources = {}
    for name, part in recipe.merging.parents.items():
        sources[name] = _part_source(recipe, source, name, part, place=("merging", "parents", name))
        own = part.get("data")
        if isinstance(own, dict) and "train" in own and "test" not in own:  # its domain is not that of the common one
            sources[name].values["data"]["test"] = None
    return _validate_all(sources)


def parts_of(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes of all that a recipe of several adapters trains by rows of its own, by name; none of one task."""
    if recipe.pipeline is not None:
        return stage_recipes(recipe)
    return parent_recipes(recipe) if recipe.merging is not None else {}


def _validate_all(sources: dict[str, YamlSource]) -> dict[str, Recipe]:
    faults, found = list[IftPeftError](), dict[str, Recipe]()
    for name, source in sources.items():
        try:
            found[name] = validate(source)
        except IftPeftError as error:
            faults += error.faults if isinstance(error, Faults) else [error]
    raise_all(faults)
    return found


# Mappings that are one value: those of a part stand in the place of the common ones, and are not laid over them.
_REPLACED = {
    "data": ("labels",),
    "adapter": ("rank_pattern", "alpha_pattern"),
    "evaluation": ("target", "unseen_instructions"),
}


def _part_source(
    recipe: Recipe, source: YamlSource | None, name: str, part: dict[str, Any], *, place: Location
) -> YamlSource:
    """The recipe with `part`, which stands at `place` in its source, over it."""
    common = recipe.model_dump(mode="json", exclude={*OF_ALL, "description"} - {"base"})
    for section, keys in _REPLACED.items():
        for key in keys if isinstance(part.get(section), dict) else ():
            if key in part[section]:
                common[section].pop(key, None)
    own = part.get("data")
    for one, other in (("instruction", "instructions"), ("train", "sources")):
        for key, rival in ((one, other), (other, one)):
            if isinstance(own, dict) and key in own:
                common["data"].pop(rival, None)
    lines = {} if source is None else dict(source.lines)
    lines |= {at[len(place) :]: line for at, line in lines.items() if at[: len(place)] == place and at != place}
    where = recipe.name if source is None else source.name
    return YamlSource(where, {**laid_over(common, part), "name": f"{recipe.name}.{name}"}, lines)


def _faults_of_parts(recipe: Recipe, source: YamlSource) -> Iterable[IftPeftError]:
    """What is wrong with the stages of a pipeline, or the parents of `merging`."""
    several = [name for name in ("tune", "pipeline", "merging") if getattr(recipe, name) is not None]
    if len(several) > 1:
        yield RecipeError(
            expected="one of tune, pipeline and merging in a recipe",
            found=f"{' and '.join(several)} at {source.where((several[-1],))}",
            fix="remove one of them",
        )
    try:
        if recipe.pipeline is not None:
            yield from _pipeline_faults(recipe, recipe.pipeline, source)
        if recipe.merging is not None:
            yield from _merging_faults(recipe.merging, parent_recipes(recipe, source))
    except IftPeftError as error:
        yield from error.faults if isinstance(error, Faults) else (error,)


def _merging_faults(merging: Merging, parents: dict[str, Recipe]) -> Iterable[RecipeError]:
    """What is wrong with the parents together. Raises what is wrong with `together`."""
    for name, own in parents.items():
        if own.data.sources:
            yield RecipeError(
                expected=f"parent {name} on one source, which is a domain of its own",
                found=f"{len(own.data.sources)} sources",
                fix="set data.train and data.test for it",
            )
        if own.adapter.method not in COMBINES:
            yield RecipeError(
                expected=f"parent {name} by a method whose deltas add up: {', '.join(COMBINES)}",
                found=own.adapter.method,
                fix="change its adapter.method",
            )
    first, *others = parents.values()
    if any(own.data == first.data for own in others):
        yield RecipeError(
            expected="parents with rows of their own, each a domain",
            found="two with the same section data",
            fix="set data.train and data.test of a parent; ift combine makes one adapter of several of one task",
        )
    if merging.together is not None:
        alike = laid_over(first.model_dump(mode="json"), merging.together)
        validate(YamlSource(f"merging.{TOGETHER}", alike))


def _pipeline_faults(recipe: Recipe, pipeline: Pipeline, source: YamlSource) -> Iterable[IftPeftError]:
    """What is wrong with a pipeline's stages together. Raises what is wrong with each by itself."""
    if recipe.data.test is None or recipe.data.sources:
        yield RecipeError(
            expected="data.train and data.test as files beside pipeline: its held-out rows must be those of all stages",
            found="data.sources" if recipe.data.sources else "no data.test",
            fix="set data.train and data.test",
        )
    try:
        found = stage_recipes(recipe, source)
    except IftPeftError:
        raise
    except ValueError as error:
        where = source.where(("pipeline",))
        yield RecipeError(expected=f"pipeline.stages to be {error}", found=f"them at {where}", fix="take one link out")
        return
    texts = {name: str(found[name].data.columns.text) for name in found}
    taken = {hole for text in (*texts.values(), pipeline.document) for hole in holes(text)}
    for name in pipeline.stages:
        if name not in taken:
            near = difflib.get_close_matches(name, [one for one in pipeline.stages if one != name], n=1)
            yield RecipeError(
                expected=f"the answer of stage {name} in the prompt of another, or in pipeline.document",
                found="it in none",
                fix=f"did you mean {near[0]!r}?" if near else f"put {{{name}}} where it belongs, or remove the stage",
            )
        if found[name].data.sources:
            yield RecipeError(
                expected=f"stage {name} on one source: data.train and data.test",
                found=f"{len(found[name].data.sources)} sources",
                fix="put the rows into one file",
            )
    asked = fields_of((texts[name] for name in pipeline.stages), pipeline.stages)
    known = {*pipeline.stages, *asked}
    unknown = [hole for hole in holes(pipeline.document) if hole not in known]
    if unknown:
        yield RecipeError(
            expected=f"names in pipeline.document of stages, or of what stages take ({', '.join(sorted(known))})",
            found=f"{', '.join(unknown)} at {source.where(('pipeline', 'document'))}",
            fix="name the answer of a stage",
        )
    if AT_ONCE in texts and not set(holes(texts[AT_ONCE])) <= set(asked):
        yield RecipeError(
            expected=f"pipeline.{AT_ONCE} to be asked what the stages are asked: {', '.join(asked)}",
            found=f"{texts[AT_ONCE]!r} as its data.columns.text",
            fix="set it to the fields of the request, as {" + (asked or ("request",))[0] + "}",
        )


def _base_is_lost(recipe: Recipe, source: YamlSource) -> RecipeError:
    """Trained biases are changed in the base itself: with the adapter off, it is not the base any more."""
    return RecipeError(
        expected="adapter.bias=none: the base that is measured is the model with its adapter off, biases included",
        found=f"{recipe.adapter.bias!r} at {source.where(('adapter', 'bias'))}",
        fix="remove it",
    )


def _validation_faults(recipe: Recipe, validation: Validation, source: YamlSource) -> Iterable[RecipeError]:
    """What validation asks of the other sections."""
    if recipe.data.streaming:
        yield RecipeError(
            expected="validation where all rows are read at once, to set some of them aside",
            found=f"data.streaming at {source.where(('data', 'streaming'))}",
            fix="set data.streaming=false, or validation=null",
        )
    if validation.metric not in (None, "loss") and not recipe.data.label_words:
        yield RecipeError(
            expected="validation.metric=loss where data has no labels",
            found=f"{validation.metric!r} at {source.where(('validation', 'metric'))}",
            fix="remove it",
        )
    for key in sorted({"save_strategy", "save_steps"} & set(recipe.training)):
        yield RecipeError(
            expected=f"validation without training.{key}: a checkpoint is written at each measurement",
            found=f"it at {source.where(('training', key))}",
            fix="remove it, and set validation.every",
        )
    limit = recipe.training.get("save_total_limit")
    if isinstance(limit, int) and limit < 2:
        yield RecipeError(
            expected="training.save_total_limit of at least 2 with validation: the best checkpoint and the newest",
            found=f"{limit} at {source.where(('training', 'save_total_limit'))}",
            fix="remove it",
        )


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it gives an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))
