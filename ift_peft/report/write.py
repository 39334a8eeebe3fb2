"""The report of a run: one HTML file that asks for nothing else, to be read in a browser, on a phone or on paper."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ift_peft.durable import write_atomically
from ift_peft.report.collect import view
from ift_peft.report.examples import Text
from ift_peft.report.merging import merging_view
from ift_peft.report.pipeline import pipeline_view
from ift_peft.run_dir import Kind, RunDir

NAME = "report.html"
TEMPLATES: dict[Kind, tuple[str, Callable[[RunDir], dict[str, Any]]]] = {
    "adapter": ("report.html.j2", view),
    "pipeline": ("pipeline.html.j2", pipeline_view),
    "merging": ("merging.html.j2", merging_view),
}


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
    name, viewed = TEMPLATES[run.kind]
    write_atomically(path, _environment().get_template(name).render(**viewed(run)))
    return path
