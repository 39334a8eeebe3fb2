"""ift backup and ift restore."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ift_peft.cli.app import DataDir, app, errors_to_exit_codes, require_serve


@app.command()
@errors_to_exit_codes
def backup(
    to: Annotated[Path, typer.Option("--to", help="File to write, e.g. service.tar.")],
    data_dir: DataDir = Path("service"),
) -> None:
    """Write a copy of all that a service keeps, while it runs: records, files, tuned models.

    Example: ift backup --data-dir service --to service.tar
    """
    require_serve()
    from ift_peft.console import out
    from ift_peft.serve.operations.backup import write_backup

    made = write_backup(data_dir.resolve(), to)
    out.print(f"backup   {to}: {made.files:,} files, {made.bytes:,} bytes", markup=False)
    for note in made.notes:
        out.print(f"  {note}", markup=False)


@app.command()
@errors_to_exit_codes
def restore(
    archive: Annotated[Path, typer.Argument(help="A file that ift backup wrote.")],
    data_dir: Annotated[Path, typer.Option("--data-dir", help="Folder to make; it must not hold anything.")],
) -> None:
    """Make the folder of a service from a backup, each file checked against its hash.

    Example: ift restore service.tar --data-dir service-2, then ift serve --data-dir service-2
    """
    require_serve()
    from ift_peft.console import out
    from ift_peft.serve.operations.backup import restore_backup

    made = restore_backup(archive, data_dir.resolve())
    out.print(f"restored {data_dir}: {made.files:,} files, {made.bytes:,} bytes", markup=False)
