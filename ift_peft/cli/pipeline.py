"""The command pipeline: a request through all stages, every intermediate answer shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ift_peft.cli.app import RunArgument, app, errors_to_exit_codes
from ift_peft.errors import IftPeftError, RunError

if TYPE_CHECKING:
    from ift_peft.infer.pipeline import Chain, Stage, Values
    from ift_peft.infer.predict import Answer


@app.command()
@errors_to_exit_codes
def pipeline(
    run: RunArgument,
    texts: Annotated[list[str] | None, typer.Argument(help="Requests; without any, lines of standard input.")] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help="JSONL file of the request's fields by name.")
    ] = None,
    output_file: Annotated[Path | None, typer.Option("--output", help="Write JSONL here instead of printing.")] = None,
    at_once: Annotated[
        bool, typer.Option("--at-once", help="Show as well what the one adapter asked for all at once writes.")
    ] = False,
) -> None:
    """Take requests through the stages of a pipeline, and show what each stage answers.

    Example: ift pipeline runs/article/latest "请介绍竹编是怎么来的。"
    """
    from ift_peft.cli.predict import given_texts
    from ift_peft.console import loading
    from ift_peft.durable import write_atomically
    from ift_peft.run_dir import PIPELINE, json_lines, open_run
    from ift_peft.stages import AT_ONCE

    if output_file is not None and not output_file.absolute().parent.is_dir():
        raise RunError(expected=f"the folder of {output_file}", found="none", fix="make it first")
    opened = open_run(run, kinds=PIPELINE)
    if at_once and AT_ONCE not in opened.parts:
        raise RunError(expected="a pipeline with at_once", found="none in its recipe", fix="leave out --at-once")
    with loading():
        from ift_peft.infer.pipeline import fill, open_chain, walk
    chain, _ = open_chain(opened, at_once=at_once)
    if input_file is None and output_file is None:
        for text in given_texts(texts):
            _show(chain, chain.request(text))
        return
    requests = (
        _read(chain, input_file) if input_file is not None else [chain.request(one) for one in given_texts(texts)]
    )
    walked = walk(chain, requests)
    whole = _at_once(chain, requests)
    lines = []
    for number, (values, answers) in enumerate(walked):
        line: dict[str, Any] = {"request": requests[number]}
        line["stages"] = {name: answer.to_json() for name, answer in answers.items()}
        line["document"] = fill(chain.document, values)
        lines.append(line if whole is None else {**line, AT_ONCE: whole[number].to_json()})
    if output_file is not None:
        write_atomically(output_file, json_lines(lines))
        return
    for line in lines:
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")


def _read(chain: Chain, path: Path) -> list[Values]:
    from ift_peft.data.rows import raise_faults
    from ift_peft.data.sources import read_source
    from ift_peft.errors import Faults

    faults: list[IftPeftError] = []
    found = []
    for record in read_source(str(path), faults):
        try:
            found.append(chain.request(record.values, where=record.where))
        except Faults as error:
            faults += error.faults
        except IftPeftError as error:
            faults.append(error)
    raise_faults(faults)
    return found


def _at_once(chain: Chain, requests: list[Values]) -> list[Answer] | None:
    from ift_peft.infer.pipeline import answer_stage

    return None if chain.at_once is None else answer_stage(chain.at_once, requests)


def _show(chain: Chain, request: Values) -> None:
    """One request on the terminal, each stage under its name, as it is written."""
    from ift_peft.console import err, out, stream
    from ift_peft.infer.pipeline import answer_stage, fill, walk

    live = sys.stdout.isatty()

    def heading(stage: Stage) -> Callable[[str], None] | None:
        err.print(stage.name, style="bold") if live else None
        return stream if live and not stage.parts.labels else None

    ((values, answers),) = walk(chain, [request], on_stage=heading)
    for name, answer in answers.items():
        if not live:
            out.print(name, style="bold")
        if not live or answer.probabilities is not None:
            stream(answer.text + "\n")
        stream("\n")
        if answer.truncated:
            err.print(f"what {name} was asked was longer than in training, and was cut", style="yellow")
    empty = [name for name, answer in answers.items() if not answer.text.strip()]
    if empty:
        raise RunError(
            expected="an answer of every stage",
            found=f"an empty one of {', '.join(empty)}",
            fix="ask in the words of the training rows, or train the stage longer",
        )
    if chain.at_once is not None:
        (whole,) = answer_stage(chain.at_once, [request])
        out.print("at once", style="bold")
        stream(f"{whole.text}\n\n")
    out.print("document", style="bold")
    stream(fill(chain.document, values) + "\n")


def print_pipeline(scores: dict[str, Any], *, title: str) -> None:
    """The tables of a pipeline's scores.json."""
    from rich.markup import escape
    from rich.table import Table

    from ift_peft.console import cell, out

    document = scores["document"]
    against = "at_once" in document
    table = Table(title=f"{title}: the document", title_justify="left", box=None, padding=(0, 2, 0, 0))
    columns = ("at_once", "pipeline", "change") if against else ("pipeline",)
    for heading in ("", *columns):
        table.add_column(heading.replace("_", " "), justify="left" if not heading else "right")
    for name in document["pipeline"]:
        table.add_row(name, *(cell(document[who].get(name), signed=who == "change") for who in columns))
    out.print(table)
    table = Table(title="each stage", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("", "metric", "from wanted answers", "from earlier stages", "change", "empty"):
        table.add_column(heading, justify="left" if heading in ("", "metric") else "right")
    for name, own in scores["stages"].items():
        metric = next(iter(own["piped"]))
        values = [cell(own[who].get(metric), signed=who == "change") for who in ("given", "piped", "change")]
        table.add_row(escape(name), metric, *values, str(own["empty"]))
    out.print()
    out.print(table)
    out.print(f"\n{scores['intervals']};\nchanges are paired: both on the same resampled rows", markup=False)
    out.print(f"{document['verdict']}\n" if against else "", markup=False)
