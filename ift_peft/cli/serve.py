"""ift serve."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ift_peft.cli.app import DataDir, StoreUrl, app, errors_to_exit_codes, require_serve
from ift_peft.errors import IftPeftError, SettingsError, raise_all

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


class EngineKind(StrEnum):
    builtin = "builtin"
    vllm = "vllm"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@app.command()
@errors_to_exit_codes
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    data_dir: DataDir = Path("service"),
    store_url: StoreUrl = None,
    base: Annotated[
        list[str] | None,
        typer.Option(help="A base to train and serve: NAME, or NAME=PATH or Hub id. Repeatable; by default tiny."),
    ] = None,
    needs_key: Annotated[
        bool, typer.Option("--require-key", help="Not to start without a key: behind a proxy all come from loopback.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A further name by which clients call the service. Repeatable.")
    ] = None,
    engine: Annotated[EngineKind, typer.Option(help="What generates answers.")] = EngineKind.builtin,
    vllm_url: Annotated[str | None, typer.Option(help="With --engine vllm: where its server answers.")] = None,
    device: Annotated[Device, typer.Option(help="Where bases are loaded and trained.")] = Device.auto,
    organization: Annotated[str, typer.Option(help="Second part of the names of tuned models.")] = "local",
    requests_per_minute: Annotated[int, typer.Option(help="Of one key, or of one address.", min=1)] = 600,
    max_waiting: Annotated[int, typer.Option(help="Chats that may wait for a place in a batch.", min=1)] = 128,
    max_rows: Annotated[int, typer.Option(help="Chats that one batch holds.", min=1)] = 16,
    max_adapters: Annotated[int, typer.Option(help="Adapters that are loaded at once on one base.", min=1)] = 32,
    max_upload_mib: Annotated[int, typer.Option(help="Largest file of rows, in MiB.", min=1)] = 512,
) -> None:
    """Serve the OpenAI API: files, fine-tuning jobs, models, chat; and a dashboard.

    Example: ift serve --port 8000, then OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

    On loopback no key is needed until one is made: ift keys create
    """
    require_serve()
    from ift_peft.serve.security.hosts import check_name
    from ift_peft.serve.server import run
    from ift_peft.serve.settings import MEBIBYTE, Limits, Settings

    faults: list[IftPeftError] = []
    bases = _bases(base or ["tiny"], faults)
    faults += _engine_faults(engine, vllm_url)
    faults += _organization_faults(organization)
    faults += [fault for name in allowed_host or () if (fault := check_name(name)) is not None]
    raise_all(faults)
    limits = Limits(
        upload_bytes=max_upload_mib * MEBIBYTE,
        requests_per_minute=requests_per_minute,
        waiting_requests=max_waiting,
        rows_together=max_rows,
        adapters=max_adapters,
    )
    run(
        Settings(
            data_dir=data_dir.resolve(),
            host=host,
            port=port,
            store_url=store_url,
            bases=bases,
            limits=limits,
            require_key=needs_key,
            allowed_hosts=tuple(allowed_host or ()),
            engine=engine.value,
            vllm_url=vllm_url,
            device=device.value,
            organization=organization,
        )
    )


def _engine_faults(engine: EngineKind, vllm_url: str | None) -> list[SettingsError]:
    if (engine == EngineKind.vllm) == (vllm_url is not None):
        return []
    found = "--engine vllm alone" if vllm_url is None else "--vllm-url alone"
    return [SettingsError(expected="--engine vllm with --vllm-url", found=found, fix="give both or neither")]


def _organization_faults(organization: str) -> list[SettingsError]:
    if re.fullmatch(r"[a-z0-9-]{1,32}", organization):
        return []
    expected = "--organization of 1 to 32 of a-z, 0-9 and -"
    return [SettingsError(expected=expected, found=repr(organization), fix="shorten it")]


def _bases(given: Sequence[str], faults: list[IftPeftError]) -> dict[str, str]:
    """Public name and `base.model` of each --base; what is wrong with one is appended to `faults`."""
    bases: dict[str, str] = {}
    for one in given:
        name, equals, model = one.partition("=")
        if not _NAME.fullmatch(name) or (equals and not model):
            faults.append(
                SettingsError(
                    expected="--base NAME or --base NAME=PATH, a name of letters, digits and ._/-",
                    found=repr(one),
                    fix="as --base qwen=Qwen/Qwen3-0.6B",
                )
            )
        elif name in bases:
            faults.append(SettingsError(expected="each --base once", found=f"{name} twice", fix="rename one"))
        else:
            path = Path(model or name)
            bases[name] = str(path.resolve()) if path.is_dir() else (model or name)
    return bases
