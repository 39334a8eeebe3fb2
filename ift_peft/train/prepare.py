"""Everything about a run that is known, and checked, before weights are loaded: rows, renderings, base, adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ift_peft.data.augment import augmented
from ift_peft.data.classify import make_renderer
from ift_peft.data.fit import Fitted, fit_rows
from ift_peft.data.instructions import Asker, ask_held_out, asked_first, asked_in, askers, unseen_pool
from ift_peft.data.quality import Cleaned, Finding, apply, find
from ift_peft.data.render import TokenRenderer
from ift_peft.data.row import Row
from ift_peft.data.rows import held_out_rows, read_rows, set_aside, stream_rows
from ift_peft.data.store import RenderedSet, content_key, render_set
from ift_peft.evaluate.measure import check_evaluation
from ift_peft.evaluate.probes import Probe, make_probes
from ift_peft.model.adapter import check_adapter
from ift_peft.model.configuration import positions, skeleton
from ift_peft.model.reach import reach
from ift_peft.model.tokenizer import (
    BaseLocation,
    ensure_pad_token,
    load_tokenizer,
    locate_base,
    require_known_tokens,
)
from ift_peft.recipe import Recipe
from ift_peft.reporter import Reporter
from ift_peft.sections import Classes, Data, Quality
from ift_peft.train.arguments import choose_max_length
from ift_peft.train.batching import Epochs

MOST_VARIANTS = 8  # phrasings of a row that are rendered; later epochs take them again in turn


@dataclass(frozen=True)
class Checked:
    """What the checks of data.quality found in the training rows, and the rows that are left."""

    findings: list[Finding]
    cleaned: Cleaned

    def notes(self) -> list[str]:
        told = [
            f"{found.severity}: {found.kind.replace('_', ' ')} in {found.count} training rows; {found.advice}"
            for found in self.findings
            if found.count
        ]
        return [*told, *self.cleaned.notes()]


@dataclass(frozen=True)
class Prepared:
    """What training and measuring need, without weights."""

    location: BaseLocation
    tokenizer: PreTrainedTokenizerBase
    renderer: TokenRenderer
    train: RenderedSet
    epochs: Epochs
    test: Fitted
    validation: Fitted | None
    probes: list[Probe]
    checked: Checked | None
    max_length: int | None
    notes: list[str]

    @property
    def lengths(self) -> Any:
        return self.train.column("length")


def prepare(recipe: Recipe, reporter: Reporter) -> Prepared:
    """Read and render the rows, and check base and adapter against each other. Loads no weights."""
    data = recipe.data
    unseen = unseen_pool(data, recipe.evaluation.unseen_instructions)
    train_rows, test_rows = (None, held_out_rows(data)) if data.streaming else read_rows(data)
    by_source = askers(data)
    check_evaluation(data, recipe.evaluation, test_rows, unseen=unseen)
    test_rows = ask_held_out(test_rows, by_source)
    location = locate_base(recipe.base.model, revision=recipe.base.revision)
    tokenizer = load_tokenizer(location)
    notes = [note for note in (ensure_pad_token(tokenizer), _unmeasured(data, test_rows)) if note]
    renderer = make_renderer(tokenizer, head=recipe.base.head, classes=data.label_words)
    if renderer.origin.startswith("fallback"):
        notes.append("the tokenizer has no chat template; 'User: …\\nAssistant: …' is used, and saved with the adapter")
    bare = skeleton(location, recipe.base.head)
    more_tokens = len(tokenizer) > len(bare.get_input_embeddings().weight)
    check_adapter(recipe.adapter, bare, quantization=recipe.base.quantization)
    max_length = choose_max_length(recipe, positions(bare.config))
    notes += reach(bare, recipe.adapter, head=recipe.base.head)
    chosen = _chosen(train_rows, test_rows, recipe, renderer, by_source, max_length=max_length)
    notes += chosen.notes
    count = None if chosen.train is None else len(chosen.train)
    variants = _variants(by_source, recipe.training, count)
    reporter.stage("tokenising training rows", count or 0)
    train = render_set(
        _asked(chosen.train, data, by_source, variants, frozenset(row.where for row in test_rows)),
        renderer,
        key=content_key(data, renderer, max_length=max_length, variants=variants, validation=recipe.validation),
        variants=variants,
        max_length=max_length,
        overlong=data.overlong,
        progress=reporter.advance,
    )
    reporter.finish()
    for ids in train.dataset["input_ids"] if more_tokens else ():
        require_known_tokens(ids, location, tokenizer, where="a training row")
    test = fit_rows(test_rows, renderer, max_length=max_length, overlong=data.overlong)
    for held_out in test.rendered if more_tokens else ():
        require_known_tokens(held_out.input_ids, location, tokenizer, where="a held-out row")
    validation = None
    if chosen.validation:
        asked = ask_held_out(chosen.validation, by_source)
        validation = fit_rows(asked, renderer, max_length=max_length, overlong=data.overlong)
    rendered = "training rows" if variants == 1 else f"renderings of training rows ({variants} of each)"
    notes += train.notes
    notes += train.fit.notes(rendered, max_length) + test.fit.notes("held-out rows", max_length)
    notes += validation.fit.notes("validation rows", max_length) if validation else []
    probes = make_probes(
        test.rows,
        by_source,
        recipe.evaluation,
        renderer,
        unseen=unseen,
        protected=data.protected_words,
        max_length=max_length,
    )
    notes += [note for probe in probes for note in probe.notes]
    epochs, checked = _epochs(data, train), chosen.checked
    return Prepared(location, tokenizer, renderer, train, epochs, test, validation, probes, checked, max_length, notes)


@dataclass(frozen=True)
class _Chosen:
    """Rows to train on, with their changed copies; those set aside; and what the checks found. Of a stream, nothing."""

    train: list[Row] | None = None
    validation: Sequence[Row] = ()
    checked: Checked | None = None
    notes: Sequence[str] = ()


def _chosen(
    rows: list[Row] | None,
    test: Sequence[Row],
    recipe: Recipe,
    renderer: TokenRenderer,
    by_source: Sequence[Asker],
    *,
    max_length: int | None,
) -> _Chosen:
    """Check the rows that were read, set some aside, and add changed copies of the others."""
    if rows is None:  # the recipe was validated: a stream has no such sections
        return _Chosen()
    data, checked, notes = recipe.data, None, []
    if data.quality is not None:
        checked = _check(rows, test, data.quality, renderer, by_source, labels=data.classes, max_length=max_length)
        rows = checked.cleaned.rows
        notes += checked.notes()
    rows, validation = set_aside(rows, recipe.validation)
    if checked is not None:
        checked = replace(checked, cleaned=replace(checked.cleaned, rows=rows))
    if data.augment is not None:
        copies = changed_copies(rows, data, [*test, *validation], by_source)
        notes.append(f"{len(copies)} changed copies of {len(rows)} training rows were added")
        rows = [*rows, *copies]
    return _Chosen(rows, validation, checked, notes)


def _check(
    train: Sequence[Row],
    test: Sequence[Row],
    section: Quality,
    renderer: TokenRenderer,
    by_source: Sequence[Asker],
    *,
    labels: Classes,
    max_length: int | None,
) -> Checked:
    """The findings of data.quality, and what is left. Raises `DataError` for findings that it stops at."""
    lengths = None
    if section.overlong != "off" and max_length is not None:
        asked = asked_first(train, by_source)
        lengths = [len(ids.input_ids) for ids in fit_rows(asked, renderer, max_length=None, overlong="error").rendered]
    findings = find(train, test, section, labels=labels, lengths=lengths, max_length=max_length)
    return Checked(findings, apply(train, findings, section))


def changed_copies(rows: Sequence[Row], data: Data, held_out: Sequence[Row], by_source: Sequence[Asker]) -> list[Row]:
    """Copies of `rows` with changed texts; none has the text of a held-out row or of another training row."""
    assert data.augment is not None
    forbidden = {row.text for row in held_out}
    copies = []
    for copy, (number, text) in enumerate(
        augmented(rows, data.augment, protected=data.protected_words, forbidden=forbidden)
    ):
        row = rows[number]
        asker = by_source[row.source]
        changed = asker.asked(row, asker.data.instruction, text=text)  # or in a phrasing drawn later
        copies.append(replace(changed, where=f"{row.where} (changed copy {copy})"))
    return copies


def _variants(by_source: Sequence[Asker], training: dict[str, Any], rows: int | None) -> int:
    """How many phrasings of each row are rendered: one for each epoch where phrasings vary by epoch."""
    if not any(asker.varies_by_epoch for asker in by_source):
        return 1
    epochs = float(training.get("num_train_epochs") or 3.0)
    steps = int(training.get("max_steps") or -1)
    if steps > 0:
        batch = int(training.get("per_device_train_batch_size") or 8) * int(
            training.get("gradient_accumulation_steps") or 1
        )
        epochs = MOST_VARIANTS if rows is None else steps * batch / rows
    return max(1, min(MOST_VARIANTS, math.ceil(epochs)))


def _asked(
    rows: Sequence[Row] | None, data: Data, by_source: Sequence[Asker], variants: int, held_out: frozenset[str]
) -> Callable[[], Iterable[Row]]:
    """Each training row in as many phrasings as are rendered."""

    def asked() -> Iterator[Row]:
        for row in stream_rows(data, held_out=held_out) if rows is None else rows:
            for variant in range(variants):
                yield asked_in(row, by_source[row.source], variant)

    return asked


def _unmeasured(data: Data, test_rows: Sequence[Row]) -> str | None:
    """A note on sources of which nothing is held out."""
    measured = {row.source for row in test_rows}
    names = data.source_names if data.mixed else [Path(str(part.train)).name for part, _ in data.by_source()]
    missing = [name for number, name in enumerate(names) if number not in measured]
    return f"no held-out rows of {', '.join(missing)}" if missing else None


def _epochs(data: Data, train: RenderedSet) -> Epochs:
    weights = tuple(weight for _, weight in data.by_source())
    if weights == (1.0,):
        return Epochs(rows=train.rows, variants=train.variants)
    sources = train.column("source")[:: train.variants]
    return Epochs(rows=train.rows, variants=train.variants, sources=sources, weights=weights, seed=data.seed)
