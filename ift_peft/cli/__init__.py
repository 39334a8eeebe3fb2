"""The command `ift`. Imports nothing heavy until a command runs."""

from ift_peft.cli import (
    after,
    backup,
    check,
    combine,
    compare,
    data,
    explain,
    export,
    harness,
    jobs,
    keys,
    pipeline,
    predict,
    serve,
    training,
    tune,
    verify_resume,
)
from ift_peft.cli.app import app

__all__ = [
    "after",
    "app",
    "backup",
    "check",
    "combine",
    "compare",
    "data",
    "explain",
    "export",
    "harness",
    "jobs",
    "keys",
    "pipeline",
    "predict",
    "serve",
    "training",
    "tune",
    "verify_resume",
]
