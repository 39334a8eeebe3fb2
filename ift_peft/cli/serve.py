"""ift serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ift_peft.cli.app import app, errors_to_exit_codes


@app.command()
@errors_to_exit_codes
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    data_dir: Annotated[Path, typer.Option(help="Where files, jobs and models are kept.")] = Path("service"),
) -> None:
    """Serve the OpenAI API: files, fine-tuning jobs, models, chat; and a dashboard.

    Example: ift serve --port 8000, then OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    """
    from ift_peft.serve.server import run
    from ift_peft.serve.settings import Settings

    run(Settings(data_dir=data_dir.resolve(), host=host, port=port))
