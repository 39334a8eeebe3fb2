"""The command `ift`. Imports nothing heavy until a command runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from ift_peft.errors import DataError, IftPeftError, RecipeError, RunError

P = ParamSpec("P")
RUNS = Path("runs")
BATCH = 256  # lines of a file answered at a time

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Parameter-efficient instruction fine-tuning: one recipe in, one proven adapter out.\n\n"
    'Example: ift train sentiment, then ift predict runs/sentiment/latest "这个产品真的很好，我非常满意。"',
)

RunArgument = Annotated[Path, typer.Argument(help="A run folder, e.g. runs/sentiment/latest.")]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Folder of all runs.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="section.key=value, e.g. training.learning_rate=1e-4 base.model=Qwen/Qwen3-0.6B"),
]


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _errors_to_exit_codes(command: Callable[P, None]) -> Callable[P, None]:
    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from ift_peft.console import err, print_error

        try:
            command(*args, **kwargs)
        except IftPeftError as error:
            print_error(error)
            raise typer.Exit(error.exit_code) from None
        except BrokenPipeError:  # the reader of our output went away, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            print_error(
                RunError(
                    expected="files that can be read and written", found=str(error), fix="check path, rights and space"
                )
            )
            raise typer.Exit(RunError.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        finally:
            err.show_cursor(True)

    return wrapped


@app.command()
@_errors_to_exit_codes
def train(
    recipe: Annotated[str | None, typer.Argument(help="A shipped recipe's name or a YAML file.")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this unfinished run instead.")] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Train a recipe, measure it before and after, and write the run.

    Example: ift train sentiment training.num_train_epochs=2
    """
    from ift_peft.console import ConsoleReporter, err, out, print_scores
    from ift_peft.recipe import load_recipe
    from ift_peft.run_dir import open_run

    if (recipe is None) == (resume is None):
        raise RecipeError(
            expected="a recipe or --resume RUN", found="both" if recipe else "neither", fix="ift train sentiment"
        )
    loaded = load_recipe(recipe, overrides or ()) if recipe is not None else None
    err.print("loading torch, transformers, peft, trl …", style="dim")
    from ift_peft.train import run as training

    reporter = ConsoleReporter()
    if loaded is not None:
        run = training.train(loaded, root=runs_dir, reporter=reporter)
    else:
        assert resume is not None
        run = training.resume(open_run(resume, finished=False), reporter=reporter)
    name, scores = run.recipe().name, run.read("scores.json")
    print_scores(scores, title=f"{name}: {scores['rows']} held-out rows")
    folder = os.path.relpath(run.path.parent / "latest" if resume is None else run.path)
    out.print(
        f"run      {os.path.relpath(run.path)}\npredict  ift predict {folder} TEXT\nmerge    ift merge {folder}",
        markup=False,
    )


@app.command()
@_errors_to_exit_codes
def evaluate(
    run: RunArgument,
    data: Annotated[Path | None, typer.Option(help="Other rows, in the form that the run's recipe reads.")] = None,
) -> None:
    """Measure base and adapter of a run again, on its own held-out rows or on others.

    Example: ift evaluate runs/sentiment/latest --data more_reviews.jsonl
    """
    from ift_peft.console import ConsoleReporter, print_scores
    from ift_peft.evaluate.run import evaluate_run
    from ift_peft.run_dir import open_run

    opened = open_run(run)
    scores = evaluate_run(opened, data=data, reporter=ConsoleReporter())
    print_scores(scores, title=f"{opened.recipe().name}: {scores['rows']} rows of {data or 'its held-out set'}")


@app.command()
@_errors_to_exit_codes
def predict(
    run: RunArgument,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; without any, lines of standard input.")] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help='JSONL file of {"text": …} or {"messages": […]}.')
    ] = None,
    output_file: Annotated[Path | None, typer.Option("--output", help="Write JSONL here instead of printing.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest generated answer, in tokens.", min=1)] = 256,
) -> None:
    """Answer texts with a run: labels with probabilities for classification, generated text otherwise.

    Example: echo "The room was spotless." | ift predict runs/sentiment/latest
    """
    from ift_peft.infer.load import load_model, open_parts
    from ift_peft.run_dir import json_lines, open_run, write_atomically

    if output_file is not None and not output_file.absolute().parent.is_dir():
        raise RunError(expected=f"the folder of {output_file}", found="none", fix="make it first")
    items = iter(_items_of_file(input_file)) if input_file is not None else ({"text": text} for text in _texts(texts))
    parts = open_parts(open_run(run))
    model, _ = load_model(parts)
    as_json = input_file is not None or output_file is not None
    if output_file is None:
        for line in _answers(model, parts, items, max_new_tokens, stream=not as_json and sys.stdout.isatty()):
            _print_answer(line, as_json=as_json)
        return
    write_atomically(output_file, json_lines(list(_answers(model, parts, items, max_new_tokens, stream=False))))


def _texts(texts: list[str] | None) -> Iterator[str]:
    if texts:
        yield from texts
        return
    if sys.stdin.isatty():
        from ift_peft.console import err

        err.print("reading texts from standard input, one a line", style="dim")
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                expected="UTF-8 text",
                found=f"byte {line[error.start]:#04x} in line {number} of standard input",
                fix="convert it: iconv -f GB18030 -t UTF-8",
            ) from None
        if text.strip():
            yield text


def _items_of_file(path: Path) -> list[dict[str, Any]]:
    from ift_peft.data.rows import raise_faults
    from ift_peft.data.sources import read_source

    faults: list[IftPeftError] = []
    records = read_source(str(path), faults)
    for record in records:
        fault = _fault_of_item(record.values)
        if fault is not None:
            faults.append(
                DataError(expected=fault, found=f"{', '.join(record.values)} at {record.where}", fix="repair it")
            )
    raise_faults(faults)
    return [record.values for record in records]


def _fault_of_item(item: dict[str, Any]) -> str | None:
    """What was expected of an item of a file, if it is not that. The answer itself must not be part of the question."""
    if "messages" not in item:
        return None if isinstance(item.get("text"), str) else "text or messages"
    messages = item["messages"]
    whole = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    return (
        None
        if whole and messages and messages[-1]["role"] == "user"
        else "messages of {role, content} ending with the user's"
    )


def _answers(
    model: Any, parts: Any, items: Iterator[dict[str, Any]], max_new_tokens: int, *, stream: bool
) -> Iterator[dict[str, Any]]:
    from ift_peft.console import stream as write
    from ift_peft.infer.predict import answer_all

    def ask_all(batch: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        prompts = [item["messages"] if "messages" in item else parts.prompt_of(item["text"]) for item in batch]
        answers = answer_all(
            model, parts, prompts, max_new_tokens=max_new_tokens, on_text=write if stream and not parts.labels else None
        )
        for item, answer in zip(batch, answers, strict=True):
            shown = {"streamed": True} if stream and not parts.labels else {}
            yield {"text": item.get("text", ""), **answer.to_json(), **shown}

    batch: list[dict[str, Any]] = []
    size = BATCH if not sys.stdin.isatty() else 1
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield from ask_all(batch)
            batch = []
    yield from ask_all(batch)


def _print_answer(line: dict[str, Any], *, as_json: bool) -> None:
    from ift_peft.console import stream

    if as_json:
        stream(json.dumps(line, ensure_ascii=False) + "\n")
    elif line.pop("streamed", False):
        stream("\n")
    elif "probabilities" in line:
        probabilities = "  ".join(f"{label} {p:.3f}" for label, p in line["probabilities"].items())
        stream(f"{line['answer']}\t{probabilities}\t{line['text']}\n")
    else:
        stream(f"{line['answer']}\n")


@app.command()
@_errors_to_exit_codes
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
@_errors_to_exit_codes
def recipes(
    show: Annotated[str | None, typer.Option(help="Print this recipe's YAML.")] = None,
) -> None:
    """List the recipes that ship, with a line each.

    Example: ift recipes --show sentiment
    """
    from ift_peft.console import out
    from ift_peft.recipe import find_recipe, load_recipe, shipped_recipes

    if show is not None:
        out.print(find_recipe(show).read_text("utf-8"), markup=False, end="")
        return
    for name in shipped_recipes():
        out.print(f"{name:<20} {load_recipe(name).description}", markup=False)


@app.command()
@_errors_to_exit_codes
def runs(runs_dir: RunsDir = RUNS) -> None:
    """List runs with their status and scores.

    Example: ift runs --runs-dir runs
    """
    from rich.table import Table

    from ift_peft.console import out
    from ift_peft.run_dir import list_runs

    table = Table(show_header=True)
    for heading in ("run", "status", "base model", "metric", "base", "adapter", "rows"):
        table.add_column(heading)
    for run in list_runs(runs_dir):
        manifest = run.read("manifest.json")
        scores = run.read("scores.json") if (run.path / "scores.json").is_file() else {}
        metric = next(iter(scores.get("adapter", {})), "")
        cells = [f"{scores[who][metric]['value']:.3f}" if metric else "" for who in ("base", "adapter")]
        base = manifest.get("base", {}).get("name", "")
        table.add_row(os.path.relpath(run.path), manifest["status"], base, metric, *cells, str(scores.get("rows", "")))
    out.print(table)
