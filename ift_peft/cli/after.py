"""Commands on a finished run: evaluate, merge, report."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ift_peft.cli.app import EnsembleOption, RunArgument, SourceOption, app, errors_to_exit_codes
from ift_peft.errors import RunError


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
@errors_to_exit_codes
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="A run folder; with --ensemble several.")],
    data: Annotated[Path | None, typer.Option(help="Other rows, in the form that the run's recipe reads.")] = None,
    source: SourceOption = None,
    ensemble: EnsembleOption = None,
) -> None:
    """Measure base and adapter of a run again, on its own held-out rows or on others; or several runs as one.

    Example: ift evaluate runs/sentiment/latest --data more_reviews.jsonl
    """
    from ift_peft.console import ConsoleReporter, print_scores
    from ift_peft.errors import raise_all
    from ift_peft.run_dir import open_run

    opened = [open_run(run) for run in runs]
    if ensemble is not None:
        from ift_peft.cli.tables import print_ensemble
        from ift_peft.evaluate.ensemble import evaluate_ensemble

        print_ensemble(evaluate_ensemble(opened, ensemble.value, data=data, source=source, reporter=ConsoleReporter()))
        return
    if len(opened) > 1:
        raise RunError(
            expected="one run, or --ensemble", found=f"{len(opened)} runs", fix="set runs side by side: ift compare"
        )
    from ift_peft.evaluate.gates import missed
    from ift_peft.evaluate.run import evaluate_run

    scores = evaluate_run(opened[0], data=data, source=source, reporter=ConsoleReporter())
    print_scores(scores, title=f"{opened[0].recipe().name}: {scores['rows']} rows of {data or 'its held-out set'}")
    raise_all(missed(scores))


@app.command()
@errors_to_exit_codes
def merge(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="Folder to write; by default RUN/merged.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the merged weights.")] = Dtype.float32,
) -> None:
    """Merge a run's adapter into its unquantised base, reload it, and compare.

    Example: ift merge runs/sentiment/latest --output sentiment-merged
    """
    from ift_peft.adapters.merge import merge as merge_run
    from ift_peft.console import ConsoleReporter, out
    from ift_peft.infer.load import open_parts
    from ift_peft.run_dir import open_run

    opened = open_run(run)
    parts = open_parts(opened)
    result = merge_run(parts, output=output or opened.path / "merged", dtype=dtype.value, reporter=ConsoleReporter())
    lines = [
        f"merged   {os.path.relpath(result.folder)} ({result.dtype})",
        f"logits   at most {result.max_logit_difference:.2e} from the adapter's on {result.rows} held-out rows",
    ]
    if result.same_labels is not None:
        lines.append(f"labels   {result.same_labels} of {result.rows} as with the adapter on the unquantised base")
    if result.same_labels_as_run is not None and parts.recipe.base.quantization != "none":
        lines.append(
            f"         {result.same_labels_as_run} of {result.rows} as in the run over {parts.recipe.base.quantization}"
        )
    out.print("\n".join(lines), markup=False)


@app.command()
@errors_to_exit_codes
def report(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="File to write; by default RUN/report.html.")] = None,
) -> None:
    """Write a run's report again: one HTML file, also of a run that did not finish.

    Example: ift report runs/sentiment/latest --output sentiment.html
    """
    from ift_peft.console import out
    from ift_peft.report.write import write_report
    from ift_peft.run_dir import open_run

    path = write_report(open_run(run, finished=False), output)
    out.print(f"report   {os.path.relpath(path)}", markup=False)
