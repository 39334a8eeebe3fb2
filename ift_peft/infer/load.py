"""A finished run as a model that answers: base, adapter and renderer, checked to be the ones that were trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ift_peft.data.classify import make_renderer
from ift_peft.data.fit import Fitted, fit_rows
from ift_peft.data.instructions import Asker, ask_held_out, askers
from ift_peft.data.render import TokenRenderer
from ift_peft.data.row import Message, Row
from ift_peft.data.rows import from_saved, read_rows, read_rows_of, set_aside, stream_rows
from ift_peft.errors import Faults, ModelError, RunError, raise_all
from ift_peft.infer.adapter_files import adapter_faults, add_adapter, load_adapter
from ift_peft.infer.parity import parity_faults
from ift_peft.infer.stacked import StackedAdapters
from ift_peft.model.base import LoadedBase, load_section
from ift_peft.model.heads import ClassHead
from ift_peft.model.initialise import whole_in_float32
from ift_peft.model.quiet import quiet
from ift_peft.model.tokenizer import (
    BaseLocation,
    ensure_pad_token,
    load_tokenizer,
    locate_base,
    require_known_tokens,
)
from ift_peft.recipe import Recipe
from ift_peft.run_dir import ADAPTER_FILES, RunDir
from ift_peft.sections import Quantization


class Question(NamedTuple):
    """A prompt, and the text in it that may be shortened; None: any user message."""

    messages: Sequence[Message]
    text: str | None = None


@dataclass(frozen=True)
class Parts:
    """What a run is made of, without weights: enough to render, compare and report.

    With `source`, the number of one, new texts are asked as its rows are and answered by its labels.
    """

    run: RunDir
    recipe: Recipe
    location: BaseLocation
    renderer: TokenRenderer
    max_length: int | None
    source: int | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.renderer.tokenizer

    @property
    def labels(self) -> tuple[str, ...]:
        data = self.recipe.data
        return data.label_words if self.source is None else data.new_texts_of(self.source)[0].label_words

    def as_source(self, name: str) -> Parts:
        """These parts for new texts of the source of this name. Raises `RunError` where there is none, or several."""
        names = self.recipe.data.source_names
        if names.count(name) == 1:
            return replace(self, source=names.index(name))
        raise RunError(
            expected=f"--source with one of {', '.join(names)}" if names else "no --source: the run has but one",
            found=f"{name!r}, as several are called" if name in names else repr(name),
            fix="name sources in the recipe (data.sources)" if name in names else "see data.sources of its recipe.yaml",
        )

    @cached_property
    def askers(self) -> list[Asker]:
        return askers(self.recipe.data)

    @cached_property
    def _more_tokens(self) -> bool:
        """Whether the tokenizer has tokens that the base may have no row for."""
        config = self.location.config()
        return len(self.tokenizer) > int(config.get("vocab_size") or 0)

    def fit_question(self, question: Question) -> tuple[Question, bool]:
        """The question as it may be asked, shortened like a training row if it must be; True if it was."""
        longest = max(self.labels, key=len) if self.labels else "…"
        answer = {"role": "assistant", "content": longest}
        row = Row((*question.messages, answer), "the given text", text=question.text)
        fitted = fit_rows([row], self.renderer, max_length=self.max_length, overlong="truncate")
        if self._more_tokens:
            require_known_tokens(fitted.rendered[0].input_ids, self.location, self.tokenizer, where="the given text")
        return Question(fitted.rows[0].prompt, fitted.rows[0].text), bool(fitted.fit.truncated)

    def fit_prompt(self, question: Question) -> tuple[tuple[Message, ...], bool]:
        """The messages of `fit_question`."""
        fitted, truncated = self.fit_question(question)
        return tuple(fitted.messages), truncated

    def ask(self, text: str) -> Question:
        """The question that training would have made of `text`; of several phrasings, the first for its language."""
        _, number = self.recipe.data.new_texts_of(self.source)
        asker = self.askers[number]
        return Question(asker.prompt(text, asker.first_instruction(text)), text)

    def converse(self, messages: Sequence[Message]) -> Question:
        """A conversation as training would have it: with the recipe's system message, where it brings none."""
        system = self.recipe.data.new_texts_of(self.source)[0].system
        head = () if not system or messages[0]["role"] == "system" else ({"role": "system", "content": system},)
        return Question((*head, *messages))


def open_parts(run: RunDir) -> Parts:
    """Recipe, base folder, tokenizer and renderer of a run.

    Raises `Faults` or `RunError` where base, chat template, the golden example's tokens or the adapter are not those of
    training, with the difference.
    """
    recipe = run.recipe()
    location = locate_base(recipe.base.model, revision=recipe.base.revision)
    tokenizer = load_tokenizer(location)
    ensure_pad_token(tokenizer)
    renderer = make_renderer(tokenizer, head=recipe.base.head, classes=recipe.data.label_words)
    raise_all(parity_faults(run, location, renderer))
    return Parts(run, recipe, location, renderer, run.read("manifest.json").get("max_length"))


def class_head(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> ClassHead | None:
    """The classifier's head that the recipe asks for, if any."""
    if recipe.base.head == "causal-lm":
        return None
    return ClassHead(recipe.data.label_words, int(tokenizer.pad_token_id), recipe.seed)


def load_model(
    parts: Parts,
    *,
    quantization: Quantization | None = None,
    compute_dtype: str | None = None,
    adapter: Path | None = None,
) -> tuple[Any, list[str]]:
    """The base with the run's adapter on it, in evaluation mode, and notes on how it was loaded.

    `quantization` and `compute_dtype` replace those the run was trained with, `adapter` the folder of its adapter, as
    by one of its checkpoints. The model is a `PeftModel`.
    """
    base = _load_base(parts, quantization=quantization, compute_dtype=compute_dtype)
    return _with_adapter(base.model, parts, adapter), base.notes


def _load_base(
    parts: Parts, *, quantization: Quantization | None = None, compute_dtype: str | None = None
) -> LoadedBase:
    for name in ADAPTER_FILES:
        if not (parts.run.adapter / name).is_file():
            raise RunError(expected=f"adapter/{name}", found=f"none in {parts.run.path}", fix="train again")
    return load_section(
        parts.location,
        parts.recipe.base,
        quantization=quantization,
        compute_dtype=compute_dtype,
        head=class_head(parts.recipe, parts.tokenizer),
    )


def _with_adapter(base: Any, parts: Parts, folder: Path | None = None) -> PeftModel:
    if folder is not None:  # the run's own was looked at when it was opened
        raise_all(list(adapter_faults(folder)))
    folder = folder or parts.run.adapter
    with quiet():
        model = load_adapter(base, folder)
        _unrounded(model, folder, "default")
    model.eval()
    return model


def _unrounded(model: PeftModel, folder: Path, name: str) -> None:
    """Load modules that were trained whole once more where PEFT has rounded them to the type of the base."""
    if whole_in_float32(model, name):
        model.load_adapter(str(folder), name)


def load_members(members: Sequence[Parts]) -> tuple[Any, list[str], list[str]]:
    """The base of the first of `members`, loaded once, with the adapters of all on it; their names, and notes.

    The model is a `PeftModel`; the first adapter is the active one. All must be of one base, which is for the caller to
    see to.
    """
    base = _load_base(members[0])
    return *_with_adapters(base.model, members), base.notes


def stack_members(members: Sequence[Parts]) -> tuple[Any, list[str], StackedAdapters | None, list[str]]:
    """As `load_members`, with the adapters stacked, so that one batch can use them all, where each is plain LoRA.

    Where one is not, or is alone, there is no stack; a note says why.
    """
    base = _load_base(members[0])
    notes = list(base.notes)
    if len(members) > 1:
        stack = StackedAdapters(base.model, max_adapters=len(members))
        names = [str(number) for number in range(len(members))]
        try:
            for name, parts in zip(names, members, strict=True):
                stack.load(name, parts.run.adapter)
            return base.model, names, stack, [*notes, f"{len(members)} adapters of one base answer in one batch"]
        except (ModelError, Faults) as error:
            stack.close()
            notes.append(f"{len(members)} adapters of one base answer one after the other: {error.found}")
    model, names = _with_adapters(base.model, members)
    return model, names, None, notes


def _with_adapters(base: Any, members: Sequence[Parts]) -> tuple[PeftModel, list[str]]:
    model = _with_adapter(base, members[0])
    names = ["default", *(f"member{number}" for number in range(1, len(members)))]
    with quiet():
        for name, parts in zip(names[1:], members[1:], strict=True):
            add_adapter(model, parts.run.adapter, name)
            _unrounded(model, parts.run.adapter, name)
    model.eval()
    return model, names


def held_out_rows(parts: Parts, data_path: Path | None = None) -> Fitted:
    """The run's own held-out rows, or those of another file read by the run's recipe."""
    if data_path is None:
        rows = [from_saved(line) for line in parts.run.read_lines("test.jsonl")]
        if not rows:
            raise RunError(expected=f"held-out rows in {parts.run.test_rows}", found="none", fix="restore the file")
    else:
        rows = read_rows_of(parts.recipe.data, str(data_path), like=parts.source)
        rows = ask_held_out(rows, parts.askers)
    return fit_rows(rows, parts.renderer, max_length=parts.max_length, overlong=parts.recipe.data.overlong)


def rows_trained_on(parts: Parts) -> Iterator[Row]:
    """The rows that the run was trained on, before they were asked: those it kept, else those its recipe names.

    Raises `Faults` where they can no longer be read.
    """
    kept, data = parts.run.path / "train.jsonl", parts.recipe.data
    if kept.is_file():  # as data.quality, and the section validation, left them
        yield from (from_saved(line) for line in parts.run.read_lines(kept.name))
    elif data.streaming:
        yield from stream_rows(data)
    else:
        yield from set_aside(read_rows(data)[0], parts.recipe.validation)[0]
