"""The command export: a run in the forms that other software takes."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ift_peft.cli.app import RunArgument, app, errors_to_exit_codes


class Form(StrEnum):
    peft = "peft"
    merged = "merged"
    gguf = "gguf"
    gguf_adapter = "gguf-adapter"
    ollama = "ollama"
    vllm = "vllm"


class Outtype(StrEnum):
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


@app.command()
@errors_to_exit_codes
def export(
    run: RunArgument,
    to: Annotated[Form, typer.Option(help="What it is for.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write; by default RUN/export/FORM.")] = None,
    outtype: Annotated[
        Outtype | None, typer.Option(help="Type of the weights; by default f16 for gguf and ollama, else f32.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a run for PEFT, transformers, llama.cpp, Ollama or vLLM, checked, and without any local path.

    Example: ift export runs/sentiment/latest --to gguf --output sentiment-gguf
    """
    from ift_peft.console import ConsoleReporter, loading, out
    from ift_peft.run_dir import open_run

    opened = open_run(run)
    with loading():
        from ift_peft.adapters.export.run import export as export_run
        from ift_peft.infer.load import open_parts

    found = export_run(
        open_parts(opened),
        to=to.value,
        output=output or opened.path / "export" / to.value,
        reporter=ConsoleReporter(),
        outtype=None if outtype is None else outtype.value,
        force=force,
    )
    out.print(f"exported {os.path.relpath(found.folder)} ({to.value})", markup=False)
    for name in found.files:
        size = (found.folder / name).stat().st_size
        out.print(f"  {name:<32} {size / 1e6:>9,.2f} MB", markup=False)
    out.print(f"how it is used: {os.path.relpath(found.folder / 'README.md')}", markup=False)
