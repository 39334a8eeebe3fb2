"""The command lm-eval: tasks of lm-evaluation-harness on a finished run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ift_peft.cli.app import RunArgument, app, errors_to_exit_codes
from ift_peft.errors import RecipeError

if TYPE_CHECKING:
    from ift_peft.evaluate.harness import Who


@app.command(name="lm-eval")
@errors_to_exit_codes
def lm_eval(
    run: RunArgument,
    tasks: Annotated[str, typer.Option(help="Tasks, groups or tags of the harness, with commas.")],
    limit: Annotated[int | None, typer.Option(help="Take this many samples of each task.", min=1)] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question.", min=0)] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of more tasks, as YAML.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in the run's chat template, as training did.")
    ] = False,
    base_only: Annotated[bool, typer.Option("--base-only", help="Measure the base alone.")] = False,
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Measure the adapter alone.")] = False,
    batch_size: Annotated[int, typer.Option(help="Requests at a time.", min=1)] = 32,
    output: Annotated[Path | None, typer.Option(help="JSON file to write; by default RUN/lm-eval.json.")] = None,
) -> None:
    """Run tasks of lm-evaluation-harness on base and adapter of a run. Needs ift_peft[lm-eval].

    Example: ift lm-eval runs/sentiment/latest --tasks arc_easy,hellaswag --limit 200
    """
    from ift_peft.console import ConsoleReporter, loading, out
    from ift_peft.durable import write_atomically
    from ift_peft.run_dir import open_run

    if base_only and adapter_only:
        raise RecipeError(expected="--base-only or --adapter-only", found="both", fix="leave both away to compare")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise RecipeError(expected="--tasks as names with commas", found=repr(tasks), fix="--tasks arc_easy,hellaswag")
    opened = open_run(run)
    with loading("torch, transformers, peft, lm_eval"):
        from ift_peft.evaluate.harness import BOTH, harness_scores
        from ift_peft.evaluate.measure import resampling

    who: tuple[Who, ...] = ("base",) if base_only else ("adapter",) if adapter_only else BOTH
    scores = harness_scores(
        opened,
        names,
        who=who,
        limit=limit,
        num_fewshot=num_fewshot,
        include_path=include_path,
        apply_chat_template=apply_chat_template,
        batch_size=batch_size,
        resampling=resampling(opened.recipe().evaluation),
        reporter=ConsoleReporter(),
    )
    _print(scores, who)
    path = output or opened.path / "lm-eval.json"
    write_atomically(path, json.dumps(scores, ensure_ascii=False, indent=2) + "\n")
    out.print(f"\n{scores['intervals']}\nwritten to {os.path.relpath(path)}", markup=False)


def _print(scores: dict[str, Any], who: tuple[Who, ...]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ift_peft.console import out

    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("task", "samples", "metric", *who, *(("change",) if len(who) > 1 else ())):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for task, measured in scores["tasks"].items():
        for metric, own in measured["scores"].items():
            cells = [_measured(own[one]) for one in who] + ([_change(own["change"])] if "change" in own else [])
            table.add_row(escape(task), f"{measured.get('samples', '')}", escape(metric), *cells)
    out.print(table)


def _measured(part: dict[str, Any]) -> str:
    return f"{part['value']:.3f}" + (f" ± {part['stderr']:.3f}" if part["stderr"] is not None else "")


def _change(part: dict[str, float]) -> str:
    interval = f" [{part['low']:+.3f}, {part['high']:+.3f}]" if "low" in part else ""
    return f"{part['value']:+.3f}{interval}"
