"""What a start of the service finds: databases that are damaged, locked or out of reach, and folders that are.

In this process where a start is refused before anything is served.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ift_peft.errors import RunError
from ift_peft.serve.service import Service
from ift_peft.serve.settings import Settings
from tests.conftest import Ift
from tests.faults.conftest import Observed
from tests.faults.fork_server import give_up_capabilities
from tests.faults.serving import _clients_are_closed, _no_network, held
from tests.faults.trained import mounted

__all__ = ["_clients_are_closed", "_no_network"]
pytestmark = pytest.mark.slow
DATABASES = ("store.sqlite", "queue.sqlite")


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder as a service leaves it."""
    data_dir = tmp_path_factory.mktemp("left") / "data"
    before = os.umask(0o077)
    serve_for_a_moment(data_dir)
    os.umask(before)
    return data_dir


def serve_for_a_moment(data_dir: Path) -> None:
    service = Service(Settings(data_dir=data_dir))
    service.start()
    service.stop()


@pytest.fixture
def data_dir(left: Path, tmp_path: Path) -> Path:
    return shutil.copytree(left, tmp_path / "data")


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """`ift serve` sets that of its process, which here is the tests'."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def refused(ift: Ift, data_dir: Path) -> str:
    """What `ift serve` says, which must not come to serving."""
    ended = ift("serve", "--port", "0", "--data-dir", str(data_dir))
    told = " ".join(ended.stderr.split())
    assert ended.returncode == RunError.exit_code and "Traceback" not in told, ended.stderr
    return told


def seen(told: str) -> str:
    """What a refusal says it found, without its advice and folders."""
    return f"exit {RunError.exit_code}: {told.partition('found ')[2].partition(' fix ')[0][:80]}"


HARMS = ("cut in half", "a page of it overwritten", "other content", "empty")


@pytest.mark.fault("service", "{database} of a data folder: {harm}", expected="refused by name, the file as it was")
@pytest.mark.parametrize(
    ("database", "harm"),
    [("store.sqlite", harm) for harm in HARMS] + [("queue.sqlite", harm) for harm in HARMS[:3]],
)
def test_a_damaged_database_is_refused(data_dir: Path, ift: Ift, observed: Observed, database: str, harm: str) -> None:
    path = data_dir / database
    content = path.read_bytes()
    harmed = {
        "cut in half": content[: len(content) // 2],
        "a page of it overwritten": content[:4096] + os.urandom(4096) + content[8192:],
        "other content": b"not a database, but somebody's notes\n" * 200,
        "empty": b"",
    }[harm]
    path.write_bytes(harmed)
    told = refused(ift, data_dir)
    assert database in told.replace(" ", ""), told
    assert path.read_bytes() == harmed
    observed(seen(told))


@pytest.mark.fault(
    "service", "{database} of a data folder {why}", expected="refused by name, and not taken for damaged"
)
@pytest.mark.parametrize("why", ["is a folder", "may not be read"])
@pytest.mark.parametrize("database", DATABASES)
def test_a_database_that_does_not_open_is_refused(
    data_dir: Path, ift: Ift, observed: Observed, database: str, why: str
) -> None:
    path = data_dir / database
    if why == "is a folder":
        path.unlink()
        path.mkdir()
        told = refused(ift, data_dir)
        assert path.is_dir()
    else:
        path.chmod(0)
        with ThreadPoolExecutor(1, initializer=give_up_capabilities) as unprivileged:  # each thread has its own
            told = unprivileged.submit(refused, ift, data_dir).result()
        path.chmod(0o600)
        assert path.read_bytes()[:6] == b"SQLite"
    assert f"{database}toopen" in told.replace(" ", "") and "move it away" not in told and "backup" not in told, told
    observed(seen(told))


@pytest.mark.fault(
    "service",
    "{database} is locked by another process ({how}) while a service starts",
    expected="refused by name, and not taken for damaged; it starts once the lock is gone",
    rare=True,
)
@pytest.mark.parametrize(
    ("database", "how"),
    [(name, how) for name in DATABASES for how in ("BEGIN IMMEDIATE", "BEGIN EXCLUSIVE")],
)
def test_a_start_over_a_locked_database_is_refused(
    data_dir: Path, fresh_ift: Ift, observed: Observed, database: str, how: str
) -> None:
    with held(data_dir / database, how):
        told = refused(fresh_ift, data_dir)
    assert f"{database}toopen" in told.replace(" ", "") and "locked" in told, told
    assert "move it away" not in told and "backup" not in told, told
    serve_for_a_moment(data_dir)
    observed(f"{seen(told)}; then it starts")


@pytest.mark.fault(
    "service", "a data folder on a file system that is read-only", expected="refused, without a traceback"
)
def test_a_read_only_folder_is_refused(tmp_path: Path, ift: Ift, observed: Observed) -> None:
    with mounted(tmp_path / "data", mebibytes=8) as data_dir:
        for name in ("files", "runs", "jobs"):
            (data_dir / name).mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(data_dir)], check=True)
        told = refused(ift, data_dir)
    assert "ead-only" in told
    observed(seen(told))
