"""The application and what its commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from ift_peft.errors import IftPeftError, OutOfMemory, RunError, first_line, is_out_of_memory

P = ParamSpec("P")
RUNS = Path("runs")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Parameter-efficient instruction fine-tuning: one recipe in, one proven adapter out.\n\n"
    'Example: ift train sentiment, then ift predict runs/sentiment/latest "这个产品真的很好，我非常满意。"',
)

RunArgument = Annotated[Path, typer.Argument(help="A run folder, e.g. runs/sentiment/latest.")]
SourceOption = Annotated[
    str | None, typer.Option("--source", help="Of a run on several sources: read and ask as this one does.")
]


class EnsembleKind(StrEnum):
    mean_logits = "mean_logits"
    mean_probs = "mean_probs"
    vote = "vote"


EnsembleOption = Annotated[
    EnsembleKind | None, typer.Option("--ensemble", help="Several runs with the same labels answer together.")
]
CalibrateOption = Annotated[
    bool, typer.Option("--calibrate", help="With --ensemble: a temperature, fitted on the runs' validation rows.")
]
DataDir = Annotated[Path, typer.Option("--data-dir", help="Where the service keeps files, jobs and models.")]
StoreUrl = Annotated[
    str | None,
    typer.Option("--store-url", help="A database for its records, as SQLAlchemy writes it; else SQLite in --data-dir."),
]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Folder of all runs.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="section.key=value, e.g. training.learning_rate=1e-4 base.model=Qwen/Qwen3-0.6B"),
]


def require_ensemble(calibrate: bool) -> None:
    """Raises `RunError` for --calibrate where nothing answers together."""
    if calibrate:
        raise RunError(expected="--calibrate with --ensemble", found="it alone", fix="leave it out, or add --ensemble")


def require_serve() -> None:
    """Raises `RunError` where the packages of the service are not installed."""
    packages = ("dbos", "fastapi", "prometheus_client", "python_multipart", "sqlalchemy", "uvicorn")
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise RunError(
            expected="the packages of the service",
            found=f"no {', '.join(missing)}",
            fix="pip install 'ift_peft[serve]'",
        )


def errors_to_exit_codes(command: Callable[P, None]) -> Callable[P, None]:
    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from ift_peft.console import err, print_error
        from ift_peft.durable import disk_full

        try:
            command(*args, **kwargs)
        except IftPeftError as error:
            print_error(error)
            raise typer.Exit(error.exit_code) from None
        except BrokenPipeError:  # the reader of our output went away, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            print_error(
                OutOfMemory(
                    expected=f"memory for ift {command.__name__}",
                    found=first_line(error),
                    fix="give less at once: smaller files or batches, a smaller base, or a machine with more",
                )
            )
            raise typer.Exit(OutOfMemory.exit_code) from None
        except OSError as error:
            told = disk_full(error, Path()) or RunError(
                expected="files that can be read and written", found=str(error), fix="check path, rights and space"
            )
            print_error(told)
            raise typer.Exit(told.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        finally:
            err.show_cursor(True)

    return wrapped
