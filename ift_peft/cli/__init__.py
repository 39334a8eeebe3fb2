"""The command `ift`. Imports nothing heavy until a command runs."""

from ift_peft.cli import (
    after,
    check,
    combine,
    compare,
    data,
    explain,
    export,
    harness,
    jobs,
    pipeline,
    predict,
    serve,
    training,
    tune,
)
from ift_peft.cli.app import app

__all__ = [
    "after",
    "app",
    "check",
    "combine",
    "compare",
    "data",
    "explain",
    "export",
    "harness",
    "jobs",
    "pipeline",
    "predict",
    "serve",
    "training",
    "tune",
]
