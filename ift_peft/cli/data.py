"""Commands on the data of a recipe: preview of what is made of its texts."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Annotated

import typer

from ift_peft.cli.app import Overrides, app, errors_to_exit_codes
from ift_peft.errors import RecipeError

if TYPE_CHECKING:
    from rich.text import Text

    from ift_peft.sections import Data, Evaluation

data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at the data of a recipe.")
app.add_typer(data, name="data")

_PIECE = re.compile(r"[A-Za-z0-9'’]+|\s+|.", re.DOTALL)


@data.callback()
def _group() -> None:
    """Look at the data of a recipe."""


@data.command()
@errors_to_exit_codes
def preview(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 5,
) -> None:
    """Show texts beside what data.augment, or else evaluation.perturbation, makes of them.

    Example: ift data preview sentiment data.augment.synonyms=0.3 --rows 10
    """
    from rich.table import Table

    from ift_peft.console import out
    from ift_peft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    title, pairs = _pairs(loaded.data, loaded.evaluation, rows)
    table = Table(title=f"{loaded.name}: {title}", title_justify="left", expand=True, show_lines=True)
    for heading in ("original", "changed"):
        table.add_column(heading, ratio=1, overflow="fold")
    for before, after in pairs:
        table.add_row(*_marked(before, after))
    out.print(table, soft_wrap=False)
    same = sum(before == after for before, after in pairs)
    if same or not pairs:
        told = f"{same} of {len(pairs)} left as they are" if pairs else "no text changed"
        out.print(f"{told}: raise the rates to change more", markup=False)
    _print_phrasings(loaded.data)


def _pairs(section: Data, evaluation: Evaluation, count: int) -> tuple[str, list[tuple[str, str]]]:
    """What is shown, and the texts of it before and after."""
    from itertools import islice

    from ift_peft.data.augment import augmented, perturbed
    from ift_peft.data.rows import held_out_rows, read_rows, stream_rows

    if section.augment is None and evaluation.perturbation is None:
        raise RecipeError(
            expected="data.augment or evaluation.perturbation to be set",
            found="neither, so that no text is changed",
            fix="for example: data.augment.synonyms=0.3, or evaluation.perturbation.noise.confuse=0.02",
        )
    train, test = (
        (list(islice(stream_rows(section), count)), held_out_rows(section)) if section.streaming else read_rows(section)
    )
    protected = section.protected_words
    if section.augment is not None:
        held_out = {row.text for row in test}
        made = augmented(train, section.augment, protected=protected, forbidden=held_out)
        pairs = [(train[number].text or "", text) for number, text in islice(made, count)]
        return "training rows and their copies (data.augment)", pairs
    assert evaluation.perturbation is not None
    shown = test[:count]
    changed = perturbed(shown, evaluation.perturbation, protected=protected)
    pairs = [(row.text or "", text) for row, text in zip(shown, changed, strict=True)]
    return "held-out rows, also measured changed (evaluation.perturbation)", pairs


def _marked(before: str, after: str) -> tuple[Text, Text]:
    """Both texts with what differs in colour: Latin by the word, the rest by the character."""
    from rich.text import Text

    old, new = _PIECE.findall(before), _PIECE.findall(after)
    left, right = Text(), Text()
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        left.append("".join(old[i:j]), style="" if kind == "equal" else "red")
        right.append("".join(new[k:m]), style="" if kind == "equal" else "green")
    return left, right


def _print_phrasings(section: Data) -> None:
    from ift_peft.console import out

    for part, _ in section.by_source():
        if part.instructions is None:
            continue
        pool = part.instructions.pool
        lists = list(pool.items()) if isinstance(pool, dict) else [("phrasings", pool)]
        for name, phrasings in lists:
            out.print(f"\n{name} ({len(phrasings)})", markup=False)
            for phrasing in phrasings:
                out.print(f"  {phrasing}", markup=False)
