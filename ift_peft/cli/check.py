"""The command check: what is wrong with a recipe's rows, and what of them is learnt, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ift_peft.cli.app import Overrides, app, errors_to_exit_codes
from ift_peft.errors import DataError

if TYPE_CHECKING:
    from ift_peft.data.fit import Fitted
    from ift_peft.data.quality import Finding
    from ift_peft.data.render import Rendered, TokenRenderer
    from ift_peft.data.row import Row
    from ift_peft.recipe import Recipe

STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


@app.command()
@errors_to_exit_codes
def check(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="Show what is learnt of this many training rows.", min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write findings and counts here.")] = None,
) -> None:
    """Check a recipe's rows without training: copies, leakage, labels, encoding, personal data, what is learnt.

    Exits with 3 where a finding is an error, or of a kind that data.quality stops at.

    Example: ift check sentiment --rows 3
    """
    from ift_peft.console import out
    from ift_peft.durable import write_atomically
    from ift_peft.recipe import load_recipe, parts_of

    loaded = load_recipe(recipe, overrides or ())
    reports = []
    for name, part in (parts_of(loaded) or {"": loaded}).items():
        if name:
            out.print(f"{name}\n", style="bold", markup=False)
        reports.append(_check(part, rows=rows))
    report = reports[0] if len(reports) == 1 else {"recipe": loaded.name, "parts": reports}
    if json_file is not None:
        write_atomically(json_file, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    if any(found["severity"] == "error" for one in reports for found in one["findings"]):
        raise typer.Exit(DataError.exit_code)


def _check(loaded: Recipe, *, rows: int) -> dict[str, Any]:
    """Print what is wrong with the rows of one task, and what of them is learnt; the same as plain values."""
    from ift_peft.console import err, out
    from ift_peft.data.instructions import ask_held_out, asked_first, askers
    from ift_peft.data.quality import apply
    from ift_peft.data.rows import read_rows
    from ift_peft.sections import Quality

    read, test = read_rows(loaded.data)
    by_source = askers(loaded.data)
    train, test = asked_first(read, by_source), ask_held_out(test, by_source)
    err.print("loading the tokenizer …", style="dim")
    renderer, max_length = _tokenizing(loaded)
    whole = _fit(train, renderer, None, loaded)
    lengths = [len(ids.input_ids) for ids in whole.rendered]
    findings = _find(loaded, train, test, lengths, max_length)
    _print_findings(findings)
    refused = any(found.severity == "error" for found in findings)
    kept = train
    if not refused:
        cleaned = apply(train, findings, loaded.data.quality or Quality())
        kept = cleaned.rows
        for note in cleaned.notes():
            out.print(f"{note}\n", markup=False)
    as_read = kept == train and all(max_length is None or length <= max_length for length in lengths)
    parts = {
        "training": whole if as_read else _fit(kept, renderer, max_length, loaded),
        "held-out": _fit(test, renderer, max_length, loaded),
    }
    _print_counts(parts, read={"training": len(train), "held-out": len(test)}, max_length=max_length)
    for row, ids in list(zip(parts["training"].rows, parts["training"].rendered, strict=True))[:rows]:
        _print_mask(row, ids, renderer)
    counts = {name: _counts(part) for name, part in parts.items()}
    return {"recipe": loaded.name, "rows": counts, "findings": [found.to_json() for found in findings]}


def _tokenizing(recipe: Recipe) -> tuple[TokenRenderer, int | None]:
    """How the recipe's base renders rows, and how long they may be. Loads no weights."""
    from ift_peft.data.classify import make_renderer
    from ift_peft.model.configuration import positions, read_config
    from ift_peft.model.tokenizer import ensure_pad_token, load_tokenizer, locate_base
    from ift_peft.train.arguments import choose_max_length

    location = locate_base(recipe.base.model, revision=recipe.base.revision)
    tokenizer = load_tokenizer(location)
    ensure_pad_token(tokenizer)
    config = read_config(location)
    renderer = make_renderer(tokenizer, head=recipe.base.head, classes=recipe.data.label_words)
    return renderer, choose_max_length(recipe, positions(config))


def _find(
    recipe: Recipe, train: Sequence[Row], test: Sequence[Row], lengths: Sequence[int], max_length: int | None
) -> list[Finding]:
    from ift_peft.console import ConsoleReporter
    from ift_peft.data.quality import find
    from ift_peft.sections import Quality

    return find(
        train,
        test,
        recipe.data.quality or Quality(),
        labels=recipe.data.classes,
        lengths=lengths,
        max_length=max_length,
        progress=ConsoleReporter(),
    )


def _fit(rows: Sequence[Row], renderer: TokenRenderer, max_length: int | None, recipe: Recipe) -> Fitted:
    from ift_peft.data.fit import fit_rows
    from ift_peft.model.quiet import quiet

    with quiet():
        return fit_rows(rows, renderer, max_length=max_length, overlong=recipe.data.overlong)


def _print_findings(findings: Sequence[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ift_peft.console import out

    if not findings:
        out.print("nothing found\n")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("severity", "finding", "count", "what to do"):
        table.add_column(heading, justify="right" if heading == "count" else "left")
    for found in findings:
        severity = f"[{STYLES[found.severity]}]{found.severity}[/]"
        table.add_row(severity, found.kind.replace("_", " "), f"{found.count:,}", escape(found.advice))
    out.print(table)
    for found in findings:
        if found.examples:
            out.print(f"\n{found.kind.replace('_', ' ')}", style="bold")
        for example in found.examples:
            out.print(f"  {example.where}  {example.why}\n    {example.excerpt}", markup=False)
    out.print()


def _counts(part: Fitted) -> dict[str, int]:
    return {
        "rows": len(part.rows),
        "tokens": part.tokens,
        "supervised_tokens": part.supervised_tokens,
        "truncated": part.fit.truncated,
        "left_out": part.fit.dropped,
    }


def _print_counts(parts: dict[str, Fitted], *, read: dict[str, int], max_length: int | None) -> None:
    from rich.table import Table

    from ift_peft.console import out

    table = Table(box=None, padding=(0, 2, 0, 0))
    cut = "cut" if max_length is None else f"cut to {max_length}"
    for heading in ("", "rows read", "rows used", "tokens", "supervised", cut, "left out"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, part in parts.items():
        table.add_row(name, f"{read[name]:,}", *(f"{count:,}" for count in _counts(part).values()))
    out.print(table)


def _print_mask(row: Row, ids: Rendered, renderer: TokenRenderer) -> None:
    """The tokens of one row: learnt ones green, or in brackets where there are no colours; the others dim."""
    from rich.text import Text

    from ift_peft.console import out

    def decode(tokens: list[int]) -> str:
        return str(renderer.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    shown, answers, before = Text(), list[int](), False
    for piece, count, supervised in _pieces(ids, decode):
        if supervised and not before:
            answers.append(0)
        if supervised:
            answers[-1] += count
        if supervised != before and not out.is_terminal:
            shown.append("⟦" if supervised else "⟧")
        elif len(shown):
            shown.append("│", style="dim")
        shown.append(piece, style="bold green" if supervised else "dim")
        before = supervised
    if before and not out.is_terminal:
        shown.append("⟧")
    turns = ", ".join(f"{count} in answer {number}" for number, count in enumerate(answers, start=1))
    out.print(f"\n{row.where}  {ids.supervised} of {len(ids.input_ids)} tokens supervised: {turns}", markup=False)
    out.print(shown)


def _pieces(ids: Rendered, decode: Callable[[list[int]], str]) -> Iterator[tuple[str, int, bool]]:
    """The text of each token, how many tokens it is of, and whether they are learnt.

    Tokens are decoded with all before them, as some tokenizers drop the space before a text; and together where a
    character is split among them.
    """
    from ift_peft.data.render import IGNORE

    learnt = [label != IGNORE for label in ids.labels]
    seen, start = "", 0
    for end in range(1, len(learnt) + 1):
        text = decode(ids.input_ids[:end])
        unfinished = text.endswith("\ufffd") and end < len(learnt) and learnt[end] == learnt[end - 1]
        if not unfinished:
            yield text[len(seen) :], end - start, learnt[end - 1]
            seen, start = text, end
