"""The command predict: texts in, answers out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ift_peft.cli.app import (
    CalibrateOption,
    EnsembleOption,
    RunArgument,
    SourceOption,
    app,
    errors_to_exit_codes,
    require_ensemble,
)
from ift_peft.errors import DataError, IftPeftError, RunError
from ift_peft.plain_files import NOT_TEXT

if TYPE_CHECKING:
    from ift_peft.infer.load import Parts, Question
    from ift_peft.run_dir import RunDir
    from ift_peft.stages import Kind

BATCH = 256  # lines of a file answered at a time


@app.command()
@errors_to_exit_codes
def predict(
    run: RunArgument,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without any, lines of standard input.")] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help='JSONL file of {"text": …} or {"messages": […]}.')
    ] = None,
    output_file: Annotated[Path | None, typer.Option("--output", help="Write JSONL here instead of printing.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Longest generated answer, in tokens; never beyond the base's last position.", min=1)
    ] = 256,
    source: SourceOption = None,
    ensemble: EnsembleOption = None,
    calibrate: CalibrateOption = False,
) -> None:
    """Answer texts with a run: labels with probabilities for classification, generated text otherwise.

    With --ensemble, several runs answer together, and texts come from --input or standard input.

    Example: echo "The room was spotless." | ift predict runs/sentiment/latest
    """
    from ift_peft.console import loading
    from ift_peft.durable import write_atomically
    from ift_peft.run_dir import json_lines, open_run

    require_ensemble(calibrate and ensemble is None)
    if output_file is not None and not output_file.absolute().parent.is_dir():
        raise RunError(expected=f"the folder of {output_file}", found="none", fix="make it first")
    if ensemble is None:
        opened = [open_run(run)]
    else:  # what looks like no run is refused, rather than answered as a text
        opened, texts = _open_all([run, *map(Path, texts or ())]), None
    with loading():
        from ift_peft.infer.load import load_model, open_parts
    items = (
        iter(_items_of_file(input_file)) if input_file is not None else ({"text": text} for text in given_texts(texts))
    )
    if ensemble is not None:
        as_json = input_file is not None or output_file is not None
        lines = _answers_together(opened, items, ensemble.value, source=source, calibrate=calibrate)
        if output_file is not None:
            write_atomically(output_file, json_lines(list(lines)))
            return
        for line in lines:
            _print_answer(line, as_json=as_json)
        return
    parts = as_asked(open_parts(opened[0]), source)
    model, _ = load_model(parts)
    as_json = input_file is not None or output_file is not None
    if output_file is None:
        for line in _answers(model, parts, items, max_new_tokens, stream=not as_json and sys.stdout.isatty()):
            _print_answer(line, as_json=as_json)
        return
    write_atomically(output_file, json_lines(list(_answers(model, parts, items, max_new_tokens, stream=False))))


def _open_all(runs: list[Path]) -> list[RunDir]:
    from ift_peft.run_dir import open_run

    opened = []
    for run in runs:
        if not run.is_dir():
            raise RunError(
                expected="run folders alone with --ensemble",
                found=repr(str(run)),
                fix="give texts by --input FILE, or one a line on standard input",
            )
        opened.append(open_run(run))
    return opened


def _answers_together(
    runs: list[RunDir], items: Iterator[dict[str, Any]], kind: Kind, *, source: str | None, calibrate: bool
) -> Iterator[dict[str, Any]]:
    from ift_peft.infer.ensemble import answer_together, check_members, open_members
    from ift_peft.infer.load import open_parts
    from ift_peft.infer.temperature import at_temperature, ensemble_temperature

    parts = [open_parts(run) for run in runs]
    if source is not None:
        parts = [one.as_source(source) if one.recipe.data.mixed else one for one in parts]
    labels = check_members(parts)
    members, _ = open_members(parts)
    temperature = ensemble_temperature(members, labels, kind)[0] if calibrate else 1.0
    while batch := list(islice(items, BATCH if not sys.stdin.isatty() else 1)):
        questions = [[_question(one, item) for item in batch] for one in parts]
        for item, answer in zip(
            batch,
            answer_together(
                members, questions, labels=labels, kind=kind, sharpen=lambda found: at_temperature(found, temperature)
            ),
            strict=True,
        ):
            yield {"text": item.get("text", ""), **answer.to_json()}


def _question(parts: Parts, item: dict[str, Any]) -> Question:
    return parts.converse(item["messages"]) if "messages" in item else parts.ask(item["text"])


def as_asked(parts: Parts, source: str | None) -> Parts:
    """The parts of a run for texts asked as `source` asks; for a mix without one it is told how they are asked."""
    from ift_peft.console import err

    if source is not None:
        return parts.as_source(source)
    if not parts.recipe.data.mixed:
        return parts
    names, (_, number) = parts.recipe.data.source_names, parts.recipe.data.for_new_texts
    asked = f"texts are asked as {names[number]} asks" if number < len(names) else "texts are asked as data says"
    err.print(f"{asked} and answered freely; --source {'|'.join(names)}", style="dim", markup=False)
    return parts


def given_texts(texts: list[str] | None) -> Iterator[str]:
    if texts:
        yield from texts
        return
    if sys.stdin.isatty():
        from ift_peft.console import err

        err.print("reading texts from standard input, one a line", style="dim")
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                expected="UTF-8 text",
                found=f"byte {line[error.start]:#04x} in line {number} of standard input",
                fix="convert it: iconv -f GB18030 -t UTF-8",
            ) from None
        if text.strip():
            yield text


def _items_of_file(path: Path) -> list[dict[str, Any]]:
    from ift_peft.data.rows import raise_faults
    from ift_peft.data.sources import read_source

    faults: list[IftPeftError] = []
    records = read_source(str(path), faults)
    for record in records:
        fault = _fault_of_item(record.values)
        if fault is not None:
            faults.append(
                DataError(expected=fault, found=f"{', '.join(record.values):.200} at {record.where}", fix="repair it")
            )
    raise_faults(faults)
    return [record.values for record in records]


def _fault_of_item(item: dict[str, Any]) -> str | None:
    """What was expected of an item of a file, if it is not that. The answer itself must not be part of the question."""
    if "messages" not in item:
        text = item.get("text")
        return (
            "text or messages" if not isinstance(text, str) else "whole characters" if NOT_TEXT.search(text) else None
        )
    messages = item["messages"]
    whole = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if whole and any(NOT_TEXT.search(m["content"]) for m in messages):
        return "whole characters"
    return (
        None
        if whole and messages and messages[-1]["role"] == "user"
        else "messages of {role, content} ending with the user's"
    )


def _answers(
    model: Any, parts: Any, items: Iterator[dict[str, Any]], max_new_tokens: int, *, stream: bool
) -> Iterator[dict[str, Any]]:
    from ift_peft.console import stream as write
    from ift_peft.infer.predict import answer_all

    def ask_all(batch: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        questions = [_question(parts, item) for item in batch]
        on_text = write if stream and not parts.labels else None
        answers = answer_all(model, parts, questions, max_new_tokens=max_new_tokens, on_text=on_text)
        for item, answer in zip(batch, answers, strict=True):
            shown = {"streamed": True} if stream and not parts.labels else {}
            yield {"text": item.get("text", ""), **answer.to_json(), **shown}

    batch: list[dict[str, Any]] = []
    size = BATCH if not sys.stdin.isatty() else 1
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield from ask_all(batch)
            batch = []
    yield from ask_all(batch)


def _print_answer(line: dict[str, Any], *, as_json: bool) -> None:
    from ift_peft.console import stream

    if as_json:
        stream(json.dumps(line, ensure_ascii=False) + "\n")
    elif line.pop("streamed", False):
        stream("\n")
    elif "probabilities" in line:
        probabilities = "  ".join(f"{label} {p:.3f}" for label, p in line["probabilities"].items())
        stream(f"{line['answer']}\t{probabilities}\t{line['text']}\n")
    else:
        stream(f"{line['answer']}\n")
