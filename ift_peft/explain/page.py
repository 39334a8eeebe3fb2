"""Explanations as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ift_peft.data.quality.finding import excerpt, text_of
from ift_peft.explain.explanation import Explanation
from ift_peft.explain.influence import CAVEATS

TEMPLATE = "page.html.jinja"


def page(explanations: Sequence[Explanation], *, run: str, top: int) -> str:
    """The HTML of `explanations` of the run named `run`, with the `top` strongest pieces of each in a table.

    Everything that is not the template's is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["zip"] = zip
    environment.filters["of_row"] = lambda row: excerpt(text_of(row))
    return environment.get_template(TEMPLATE).render(explanations=explanations, run=run, top=top, caveats=CAVEATS)
