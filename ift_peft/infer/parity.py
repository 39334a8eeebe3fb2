"""What a run is opened with, held against what it was trained with; where they differ, the difference is shown."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ift_peft.data.render import TokenRenderer
from ift_peft.errors import DataError, IftPeftError, RunError, first_line
from ift_peft.infer.adapter_files import adapter_faults
from ift_peft.model.quiet import quiet
from ift_peft.model.tokenizer import BaseLocation
from ift_peft.run_dir import RunDir

_MOST_LINES = 16  # of a difference
_LONGEST_LINE = 110
_CONTEXT = 24  # characters before the first token that differs


def parity_faults(run: RunDir, location: BaseLocation, renderer: TokenRenderer) -> list[IftPeftError]:
    """Everything in which base, chat template, tokens or adapter are not those of training.

    What an older run has not recorded is not checked, or told by its hash alone.
    """
    manifest, golden = run.read("manifest.json"), run.read("golden.json")
    broken = [
        *_not_as_written(run, "manifest.json", manifest, _Manifest),
        *_not_as_written(run, "golden.json", golden, _Golden),
    ]
    if broken:
        return broken
    return [
        *_base(manifest, location),
        *_template(golden, renderer),
        *_tokens(run, golden, renderer),
        *_adapter(manifest, run),
        *adapter_faults(run.adapter),
    ]


class _Inputs(BaseModel):
    base_fingerprint: str


class _Base(BaseModel):
    name: str
    files: dict[str, dict[str, Any]] = {}
    config: dict[str, Any] | None = None


class _Manifest(BaseModel):
    """What is read of a manifest here, as `record_inputs` writes it."""

    inputs: _Inputs
    base: _Base
    adapter_sha256: dict[str, str] = {}
    max_length: Annotated[int, Field(gt=0)] | None = None


class _Golden(BaseModel):
    template_sha256: str
    template: str | None = None
    messages: Annotated[list[dict[str, str]], Field(min_length=1)]
    input_ids: list[Annotated[int, Field(ge=0, lt=1 << 31)]]
    labels: list[Annotated[int, Field(ge=-100, lt=1 << 31)]]


def _not_as_written(run: RunDir, name: str, content: dict[str, Any], form: type[BaseModel]) -> Iterator[IftPeftError]:
    """What somebody has made of a record of the run that no training writes."""
    try:
        form.model_validate(content, strict=True)
    except ValidationError as error:
        for one in error.errors()[:3]:
            place = ".".join(map(str, one["loc"]))
            yield RunError(
                expected=f"{place} in {run.path / name}",
                found=f"{one['msg']}: {one['input']!r:.80}",
                fix="restore the file, or train again",
            )


def _base(manifest: Mapping[str, Any], location: BaseLocation) -> Iterator[IftPeftError]:
    then, now = manifest["inputs"]["base_fingerprint"], location.fingerprint()
    if then == now:
        return
    recorded = manifest["base"]
    lines = [*_files(recorded.get("files", {}), location.files()), *_settings(recorded.get("config"), location)]
    yield RunError(
        expected=f"the base as in training ({then[:12]})",
        found=_shown(f"another ({now[:12]}) in {location.folder}", lines),
        fix=f"restore the base {recorded['name']!r} that the adapter was trained on, or train again",
    )


def _files(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(then.keys() | now.keys()) if then else ():
        if name not in now:
            yield f"{name}: gone"
        elif name not in then:
            yield f"{name}: not there in training"
        elif then[name]["bytes"] != now[name]["bytes"]:
            yield f"{name}: {now[name]['bytes']:,} bytes, not {then[name]['bytes']:,}"
        elif then[name] != now[name]:
            yield f"{name}: other content of the same size"


def _settings(then: Mapping[str, Any] | None, location: BaseLocation) -> Iterator[str]:
    if then is None:
        return
    now = location.config()
    for key in sorted(then.keys() | now.keys()):
        ours, theirs = (json.dumps(one[key]) if key in one else "not there" for one in (then, now))
        if ours != theirs:
            yield f"config.json, {key}: {theirs}, not {ours}"


def _template(golden: Mapping[str, Any], renderer: TokenRenderer) -> Iterator[IftPeftError]:
    then, now = golden["template_sha256"], renderer.template_hash
    if then == now:
        return
    lines: Sequence[str] = ()
    if golden.get("template") is not None:
        both = (_in_lines(golden["template"]), _in_lines(renderer.template))
        lines = list(difflib.unified_diff(*both, "as trained", "as found", n=1, lineterm=""))
    yield RunError(
        expected=f"the chat template as in training ({then[:12]})",
        found=_shown(f"another ({now[:12]})", lines),
        fix="restore the base's tokenizer",
    )


def _in_lines(template: str) -> list[str]:
    """A template's lines, broken behind its tags: many templates are one line."""
    return [line for line in re.sub(r"(%\}|\}\})(?!\n)", r"\1\n", template).splitlines() if line]


def _tokens(run: RunDir, golden: Mapping[str, Any], renderer: TokenRenderer) -> Iterator[IftPeftError]:
    then, now, what = golden["input_ids"], [], "tokens"
    try:
        (rendered,) = renderer.render([golden["messages"]])
    except DataError as error:
        found = f"that it cannot be rendered: {first_line(error)}"
    else:
        now = rendered.input_ids
        if then == now and golden["labels"] == rendered.labels:
            return
        if then == now:
            then, now, what = golden["labels"], rendered.labels, "labels"
        found = _first_difference(then, now, _trained_tokenizer(run) or renderer.tokenizer, renderer.tokenizer)
    yield RunError(
        expected=f"the golden example's {what} as in training", found=found, fix="restore the base's tokenizer"
    )


def _trained_tokenizer(run: RunDir) -> PreTrainedTokenizerBase | None:
    """The one saved with the adapter; None where it cannot be read."""
    try:
        with quiet():
            found = AutoTokenizer.from_pretrained(run.adapter, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError):
        return None
    return found if isinstance(found, PreTrainedTokenizerBase) else None


def _first_difference(
    then: Sequence[int], now: Sequence[int], trained: PreTrainedTokenizerBase, found: PreTrainedTokenizerBase
) -> str:
    """The first position at which the ids differ, with the token on either side and the text before it."""
    at = next(at for at, (a, b) in enumerate(zip_longest(then, now)) if a != b)
    before = trained.decode([one for one in then[:at] if one >= 0])[-_CONTEXT:]
    return (
        f"{_token(now, at, found)} at position {at}, where training had {_token(then, at, trained)}, after {before!r}; "
        f"{len(now)} in all, then {len(then)}"
    )


def _token(ids: Sequence[int], at: int, tokenizer: PreTrainedTokenizerBase) -> str:
    if at >= len(ids):
        return "the end"
    if ids[at] < 0:
        return "no label"
    return f"{tokenizer.decode([ids[at]])!r} (id {ids[at]})"


def _adapter(manifest: Mapping[str, Any], run: RunDir) -> Iterator[IftPeftError]:
    recorded, now = manifest.get("adapter_sha256", {}), run.adapter_hashes()
    for name, then in recorded.items():
        if now.get(name) != then:
            there = f"another ({now[name][:12]})" if name in now else "none"
            yield RunError(
                expected=f"adapter/{name} as in training ({then[:12]})",
                found=f"{there} in {run.path}",
                fix="restore the file, or train again; an adapter from elsewhere is no part of this run",
            )


def _shown(found: str, lines: Iterator[str] | Sequence[str]) -> str:
    """What was found with the lines of a difference below it, shortened where they are long or many."""
    lines = [line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}…" for line in lines]
    more = [f"… and {len(lines) - _MOST_LINES} lines more"] if len(lines) > _MOST_LINES else []
    return "\n         ".join([found, *lines[:_MOST_LINES], *more])
