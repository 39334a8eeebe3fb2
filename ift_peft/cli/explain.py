"""The command explain: which tokens carried an answer, and which training rows pulled it there."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ift_peft.cli.app import RunArgument, SourceOption, app, errors_to_exit_codes
from ift_peft.cli.predict import as_asked, given_texts
from ift_peft.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ift_peft.explain.attribution import Attribution
    from ift_peft.explain.explanation import Explanation
    from ift_peft.explain.influence import Influence, Pull
    from ift_peft.explain.pieces import Piece

SHOWN = 1 / 3  # pieces of at least this share of the strongest are marked
STRONG = 2 / 3
FAR_OFF = 0.01  # of the score's change, from which the sum of the values is worth another try
# Blue and orange of Okabe and Ito's palette, which every kind of colour vision tells apart.
FOR, AGAINST = ("#0072b2", "#56b4e9"), ("#e69f00", "#e69f00")


class ExplainMethod(StrEnum):
    occlusion = "occlusion"
    integrated_gradients = "integrated-gradients"


@app.command()
@errors_to_exit_codes
def explain(
    run: RunArgument,
    text: Annotated[
        list[str] | None, typer.Option(help="A text; may be repeated. Without it, lines of standard input.")
    ] = None,
    source: SourceOption = None,
    answer: Annotated[
        str | None, typer.Option(help="Explain this answer instead of the one that the run gives.")
    ] = None,
    method: Annotated[ExplainMethod, typer.Option(help="How tokens are weighed.")] = ExplainMethod.occlusion,
    steps: Annotated[int, typer.Option(help="Points of integrated gradients.", min=2)] = 32,
    top: Annotated[int, typer.Option(help="Show this many pieces of the prompt with numbers.", min=0)] = 10,
    rows: Annotated[int, typer.Option(help="Show this many training rows for and against; 0: none.", min=0)] = 5,
    sample: Annotated[
        int | None,
        typer.Option(help="Look at this many training rows; by default as many as take about a minute.", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training rows that are looked at.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest generated answer, in tokens.", min=1)] = 256,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write one HTML file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON.")] = None,
) -> None:
    """Tell why a run answers a text as it does: the tokens that carried it, and the training rows that taught it.

    Example: ift explain runs/sentiment/latest --text "The room was spotless, the staff rude."
    """
    from ift_peft.console import ConsoleReporter, loading
    from ift_peft.durable import write_atomically
    from ift_peft.run_dir import open_run

    for file in (html_file, json_file):
        if file is not None and not file.absolute().parent.is_dir():
            raise RunError(expected=f"the folder of {file}", found="none", fix="make it first")
    opened = open_run(run)
    with loading("torch, transformers, captum"):
        from ift_peft.explain.explanation import explain as explain_one
        from ift_peft.explain.explanation import with_training_rows
        from ift_peft.explain.influence import training_rows
        from ift_peft.explain.page import page
        from ift_peft.infer.load import load_model, open_parts

    parts = as_asked(open_parts(opened), source)
    model, _ = load_model(parts)
    training = training_rows(parts, model, sample=sample, seed=seed) if rows else None
    explanations = [
        explain_one(model, parts, one, method=method.value, answer=answer, steps=steps, max_new_tokens=max_new_tokens)
        for one in given_texts(text)
    ]
    if training is not None and explanations:
        reporter = ConsoleReporter()
        explanations = with_training_rows(model, parts, explanations, training, rows=rows, reporter=reporter)
    for explanation in explanations:
        _print(explanation, top=top)
    name = "/".join(opened.path.parts[-2:])
    if html_file is not None:
        write_atomically(html_file, page(explanations, run=name, top=top))
    if json_file is not None:
        content = {"run": name, "explanations": [explanation.to_json() for explanation in explanations]}
        write_atomically(json_file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _print(one: Explanation, *, top: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ift_peft.console import out

    chances = one.probabilities
    told = [
        f"{who} {found.score:+.3f}" + ("" if chances is None else f" (p {chances[which]:.3f})")
        for which, (who, found) in enumerate((("adapter", one.adapter), ("base", one.base)))
    ]
    cut = "  (the text was too long and its end was cut)" if one.truncated else ""
    out.print(f"{one.answer}  {one.score_name}: {', '.join(told)}{cut}", markup=False, style="bold")
    for who, found in (("adapter", one.adapter), ("base", one.base)):
        out.print(f"\n{who}", style="dim")
        out.print(_marked(one.pieces, found))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("piece", "of", "adapter", "base"):
        table.add_column(heading, justify="right" if heading in ("adapter", "base") else "left")
    for number in one.strongest[:top]:
        piece = one.pieces[number]
        values = (f"{found.values[number]:+.3f}" for found in (one.adapter, one.base))
        table.add_row(escape(piece.text.strip() or "␣"), piece.kind, *values)
    if top:
        out.print()
        out.print(table)
    out.print(f"\n{_how(one)}", markup=False, style="dim")
    if one.influence is not None:
        _print_influence(one.influence)
    out.print()


def _how(one: Explanation) -> str:
    """What the values mean, and how far they are from adding up where they are meant to."""
    found = one.adapter
    if found.baseline is None or found.delta is None:
        return "nats that the score loses when the piece is taken out; they do not add up to it"
    change = found.score - found.baseline
    told = (
        f"nats, adding up to the score less that of an empty prompt: {found.score:+.3f} - {found.baseline:+.3f} = "
        f"{change:+.3f}, missed by {abs(found.delta):.1e}"
    )
    return told + ("; raise --steps" if abs(found.delta) > FAR_OFF * abs(change) else "")


def _marked(pieces: Sequence[Piece], found: Attribution) -> Any:
    """The prompt with its stronger pieces coloured; ⟦+for⟧ and ⟦-against⟧ where there are no colours."""
    from rich.text import Text

    from ift_peft.console import out

    coloured = out.color_system is not None and not out.no_color
    most = max(map(abs, found.values)) or 1.0
    shown = Text()
    for piece, value in zip(pieces, found.values, strict=True):
        share = abs(value) / most
        base = {"template": "dim", "instruction": "italic", "text": ""}[piece.kind]
        if share < SHOWN:
            shown.append(piece.text, style=base)
        elif not coloured:
            bare = piece.text.lstrip()
            shown.append(f"{piece.text[: len(piece.text) - len(bare)]}⟦{'+' if value > 0 else '-'}{bare.rstrip()}⟧")
            shown.append(bare[len(bare.rstrip()) :])
        else:
            strong, weak = FOR if value > 0 else AGAINST
            ink = "white" if value > 0 else "black"
            shown.append(piece.text, style=f"bold {ink} on {strong}" if share >= STRONG else f"{base} underline {weak}")
    return shown


def _print_influence(found: Influence) -> None:
    from ift_peft.console import out
    from ift_peft.explain.influence import CAVEATS

    out.print("\ntraining rows that pulled towards this answer", style="bold")
    _print_pulls(found.helping)
    out.print("training rows that pulled away from it", style="bold")
    _print_pulls(found.opposing)
    told = f"{found.looked:,} of {found.rows:,} training rows looked at"
    out.print(
        f"\n{told}; cosine of gradients over {found.weights:,} adapter weights. {' '.join(CAVEATS)}",
        markup=False,
        style="dim",
    )


def _print_pulls(pulls: Sequence[Pull]) -> None:
    from ift_peft.console import out
    from ift_peft.data.quality.finding import excerpt, text_of

    for pull in pulls:
        answer, text = excerpt(pull.row.answer), excerpt(text_of(pull.row))
        out.print(f"  {pull.similarity:+.3f}  {answer}  {text}  ({pull.row.key})", markup=False)
    if not pulls:
        out.print("  none")
