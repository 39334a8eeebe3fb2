"""Commands on a finished run: evaluate, merge, report."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

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
from ift_peft.errors import RunError


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Preference(StrEnum):
    fidelity = "fidelity"
    quality = "quality"


class Packing(StrEnum):
    nf4 = "nf4"


@app.command()
@errors_to_exit_codes
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="A run folder; with --ensemble several.")],
    data: Annotated[Path | None, typer.Option(help="Other rows, in the form that the run's recipe reads.")] = None,
    source: SourceOption = None,
    ensemble: EnsembleOption = None,
    calibrate: CalibrateOption = False,
) -> None:
    """Measure base and adapter of a run again, on its own held-out rows or on others; or several runs as one.

    Example: ift evaluate runs/sentiment/latest --data more_reviews.jsonl
    """
    from ift_peft.console import ConsoleReporter, loading, print_scores
    from ift_peft.errors import raise_all
    from ift_peft.run_dir import open_run

    opened = [open_run(run) for run in runs]
    if ensemble is not None:
        from ift_peft.cli.tables import print_ensemble

        with loading():
            from ift_peft.evaluate.ensemble import evaluate_ensemble
        reporter = ConsoleReporter()
        scores = evaluate_ensemble(
            opened, ensemble.value, data=data, source=source, reporter=reporter, calibrate=calibrate
        )
        print_ensemble(scores)
        return
    require_ensemble(calibrate)
    if len(opened) > 1:
        raise RunError(
            expected="one run, or --ensemble", found=f"{len(opened)} runs", fix="set runs side by side: ift compare"
        )
    from ift_peft.evaluate.gates import missed

    with loading():
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
    prefer: Annotated[
        Preference,
        typer.Option(
            help="Of a run over a quantised base, write what answers most like the run, or what scores best on its "
            "held-out rows."
        ),
    ] = Preference.fidelity,
    quantize: Annotated[
        Packing | None, typer.Option(help="Quantise the merged weights again; what that costs is measured.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Size of the files written, e.g. 2GB; by default that of the base's files.")
    ] = None,
) -> None:
    """Merge a run's adapter into its base, reload it, compare, and certify what was measured.

    Example: ift merge runs/sentiment/latest --output sentiment-merged
    """
    from ift_peft.cli.tables import print_merge
    from ift_peft.console import ConsoleReporter, loading
    from ift_peft.run_dir import open_run

    opened = open_run(run)
    with loading():
        from ift_peft.adapters.merge import merge as merge_run
        from ift_peft.infer.load import open_parts
    parts = open_parts(opened)
    result = merge_run(
        parts,
        output=output or opened.path / "merged",
        dtype=dtype.value,
        reporter=ConsoleReporter(),
        prefer=prefer.value,
        quantize=None if quantize is None else "nf4",
        max_shard_size=max_shard_size,
    )
    print_merge(result, quantization=parts.recipe.base.quantization)


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
    from ift_peft.run_dir import ANY, open_run

    path = write_report(open_run(run, finished=False, kinds=ANY), output)
    out.print(f"report   {os.path.relpath(path)}", markup=False)
