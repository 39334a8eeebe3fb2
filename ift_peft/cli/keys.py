"""ift keys: create, list, revoke, rotate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ift_peft.cli.app import DataDir, StoreUrl, app, errors_to_exit_codes, require_serve

if TYPE_CHECKING:
    from ift_peft.serve.store import Record, Store

keys_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Keys of the service's clients.")
app.add_typer(keys_app, name="keys")

KeyArgument = Annotated[str, typer.Argument(help="Id of a key, as ift keys list shows it.")]
SERVICE = Path("service")


@keys_app.command()
@errors_to_exit_codes
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="inference, read, write or admin (all of them). Repeatable; by default the first three."),
    ] = None,
    days: Annotated[float | None, typer.Option(help="Days after which it ends.", min=0.001)] = None,
    data_dir: DataDir = SERVICE,
    store_url: StoreUrl = None,
) -> None:
    """Make a key. It is printed once, alone on stdout; the service keeps its hash.

    Example: ift keys create laptop --scope inference --days 90
    """
    from ift_peft.console import err

    with _store(data_dir, store_url) as store:
        from ift_peft.serve.security.keys import create_key

        key_id, text = create_key(store, name, scopes=scope or ("inference", "read", "write"), days=days)
    err.print(f"key {key_id}: it is shown this once", markup=False)
    typer.echo(text)


@keys_app.command("list")
@errors_to_exit_codes
def list_all(data_dir: DataDir = SERVICE, store_url: StoreUrl = None) -> None:
    """Every key with its scopes, and when it was made, was last used and ends.

    Example: ift keys list
    """
    from rich.markup import escape
    from rich.table import Table

    from ift_peft.console import out

    with _store(data_dir, store_url) as store:
        from ift_peft.serve.security.keys import list_keys

        found = list_keys(store)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("id", "name", "scopes", "created", "last used", "ends"):
        table.add_column(heading)
    for key in found:
        used, made = _time(key["used_at"]), _time(key["created_at"])
        table.add_row(key["id"], escape(key["name"]), ", ".join(key["scopes"]), made, used, _end(key))
    out.print(table)


@keys_app.command()
@errors_to_exit_codes
def revoke(key: KeyArgument, data_dir: DataDir = SERVICE, store_url: StoreUrl = None) -> None:
    """End a key now, and the dashboard sessions made from it.

    Example: ift keys revoke 9fK2mQ7xLw3TzB8c
    """
    from ift_peft.console import err

    with _store(data_dir, store_url) as store:
        from ift_peft.serve.security.keys import revoke_key

        revoke_key(store, key)
    err.print(f"key {key} is revoked", markup=False)


@keys_app.command()
@errors_to_exit_codes
def rotate(
    key: KeyArgument,
    grace_hours: Annotated[float, typer.Option(help="Hours for which the old key stays valid.", min=0)] = 24.0,
    data_dir: DataDir = SERVICE,
    store_url: StoreUrl = None,
) -> None:
    """Make a new key with the name and scopes of an old one, which ends after a time.

    Example: ift keys rotate 9fK2mQ7xLw3TzB8c --grace-hours 24
    """
    from ift_peft.console import err

    with _store(data_dir, store_url) as store:
        from ift_peft.serve.security.keys import rotate_key

        key_id, text = rotate_key(store, key, grace_hours=grace_hours)
    err.print(f"key {key_id} in the place of {key}, which ends in {grace_hours:g} h", markup=False)
    typer.echo(text)


@contextmanager
def _store(data_dir: Path, store_url: str | None) -> Iterator[Store]:
    """The service's records, whether it runs or not."""
    require_serve()
    from ift_peft.serve.settings import Settings
    from ift_peft.serve.store import Store
    from ift_peft.serve.store.check import opening

    settings = Settings(data_dir=data_dir.resolve(), store_url=store_url)
    before = os.umask(0o077)  # the database is the owner's alone, whatever the folder is
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with opening(settings.database_url), closing(Store(settings.database_url)) as store:
            yield store
    finally:
        os.umask(before)


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def _end(key: Record) -> str:
    revoked = key["revoked_at"]
    return f"revoked {_time(revoked)}" if revoked is not None else _time(key["expires_at"])
