"""The report of a run: one HTML file that asks for nothing else, to be read in a browser, on a phone or on paper."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ift_peft.report.collect import view
from ift_peft.report.examples import Text
from ift_peft.run_dir import RunDir, write_atomically

NAME = "report.html"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["as_text"] = Text
    return environment


def write_report(run: RunDir, output: Path | None = None) -> Path:
    """Write the report of `run`, by default into it, and return where it is. Loads neither weights nor torch.

    Everything that came from rows, labels or the recipe is escaped. A run without scores, such as one that failed, has
    a report of what there is. Raises `RunError` for a run whose files are broken.
    """
    path = output or run.path / NAME
    write_atomically(path, _environment().get_template("report.html.j2").render(**view(run)))
    return path
