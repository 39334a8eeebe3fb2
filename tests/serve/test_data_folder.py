"""A data folder and its store: a start over what is not its own is refused, and deletes nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ift_peft.cli.app import app
from ift_peft.errors import RunError, SettingsError
from ift_peft.serve.files.records import clean
from ift_peft.serve.operations.backup import restore_backup, write_backup
from ift_peft.serve.security.guard import require_key
from ift_peft.serve.security.keys import create_key
from ift_peft.serve.service import Service
from ift_peft.serve.settings import Settings
from ift_peft.train.checkpoints import REQUIRED
from tests.serve.inside import serving
from tests.serve.test_files import ROWS, add_job

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """`ift serve` sets that of its process, which here is the tests'."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def refused(data_dir: Path, text: str, **settings: str) -> None:
    before = {path: path.read_bytes() for path in (data_dir / "files").iterdir()}
    with pytest.raises(RunError, match=text), serving(data_dir, **settings):
        pass
    assert {path: path.read_bytes() for path in (data_dir / "files").iterdir()} == before


def test_a_start_with_another_store_is_refused_and_deletes_nothing(tmp_path: Path) -> None:
    data_dir, url = tmp_path / "data", f"sqlite:///{tmp_path / 'elsewhere.sqlite'}"
    with serving(data_dir, store_url=url) as running:
        kept = running.client().files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    refused(data_dir, "the store of")
    assert not (data_dir / "store.sqlite").exists(), "nothing is made for the next start to believe in"
    refused(data_dir, "the store of", store_url=f"sqlite:///{tmp_path / 'third.sqlite'}")
    (data_dir / ".store").unlink()
    refused(data_dir, "does not know", store_url=f"sqlite:///{tmp_path / 'third.sqlite'}")
    for _ in range(2):  # without the mark, as an older folder is, and with the new one
        with serving(data_dir, store_url=url) as running:
            assert running.client().files.content(kept.id).content == ROWS


def test_a_folder_of_somebody_else_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine" / "files").mkdir(parents=True, mode=0o755)
    (tmp_path / "mine" / "files" / "thesis.tex").write_text("years", "utf-8")
    refused(tmp_path / "mine", "thesis.tex")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["files"], "and nothing is made in it"
    service = Service(Settings(data_dir=tmp_path / "data"))
    names = {f"file-{'a' * 24}.bak", f"file-{'b' * 24}", ".upload-x", f".file-{'c' * 24}.abc"}
    try:
        for name in names:
            (service.settings.files / name).write_bytes(b"rows")
        with pytest.raises(RunError, match="bak"):
            service.housekeeping.start()
        assert {path.name for path in service.settings.files.iterdir()} == names
        (service.settings.files / f"file-{'a' * 24}.bak").unlink()
        clean(service.settings, service.store)
        assert not list(service.settings.files.iterdir())
    finally:
        service.release()


def test_a_restored_folder_is_taken_for_its_stores(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as running:
        kept = running.client().files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        write_backup(running.data_dir, tmp_path / "copy.tar")
    restore_backup(tmp_path / "copy.tar", tmp_path / "new")
    with serving(tmp_path / "new") as running:
        assert running.client().files.content(kept.id).content == ROWS
    assert (tmp_path / "new" / ".store").read_bytes() == (tmp_path / "data" / ".store").read_bytes()


@pytest.mark.parametrize("given", ["nan", "inf", "1e300", "999999"])
def test_a_key_ends_at_a_time_that_there_is(tmp_path: Path, given: str) -> None:
    where = ["--data-dir", str(tmp_path / "data")]
    made = CliRunner().invoke(app, ["keys", "create", "first", *where])
    key_id = made.stdout.strip()[7:23]
    for command in (["create", "second", "--days", given], ["rotate", key_id, "--grace-hours", given]):
        told = CliRunner().invoke(app, ["keys", *command, *where])
        assert told.exit_code == SettingsError.exit_code, told.output
    listed = CliRunner().invoke(app, ["keys", "list", *where]).stdout
    assert key_id in listed and "second" not in listed


def test_a_backup_beside_a_training_holds_what_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that shrinks while it is copied, and a checkpoint that is being written."""
    with serving(tmp_path / "data") as running:
        add_job(running, "file-none", status="running", run="runs/ftjob-1/one")
        checkpoints = running.data_dir / "runs" / "ftjob-1" / "one" / "checkpoints"
        for place, names in (("checkpoint-2", REQUIRED), (".partial/checkpoint-4", REQUIRED[:2])):
            (checkpoints / place).mkdir(parents=True)
            for name in names:
                (checkpoints / place / name).write_bytes(b"{}")
        log = running.data_dir / "jobs" / "ftjob-1" / "log"
        log.parent.mkdir()
        log.write_bytes(b"x" * 3_000_000)
        fstat = os.fstat

        def shrinking(handle: int) -> os.stat_result:
            found = fstat(handle)
            if os.readlink(f"/proc/self/fd/{handle}") == str(log):
                os.truncate(log, 1_000_000)
            return found

        monkeypatch.setattr(os, "fstat", shrinking)
        made = write_backup(running.data_dir, tmp_path / "copy.tar")
        monkeypatch.undo()
    (unfinished,) = (note for note in made.notes if "being written" in note)
    assert ".partial" in unfinished
    restore_backup(tmp_path / "copy.tar", tmp_path / "new")
    assert (tmp_path / "new" / "jobs" / "ftjob-1" / "log").stat().st_size == 1_000_000
    kept = [path.name for path in (tmp_path / "new" / "runs" / "ftjob-1" / "one" / "checkpoints").iterdir()]
    assert kept == ["checkpoint-2"]


def test_a_start_that_needs_a_key_is_refused_without_one(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["serve", "--require-key", "--port", "0", "--data-dir", str(tmp_path / "data")])
    assert told.exit_code == SettingsError.exit_code
    assert "ift keys create first" in " ".join(told.output.split())
    service = Service(Settings(data_dir=tmp_path / "data", require_key=True))
    try:
        create_key(service.store, "first", scopes=["read"])
        require_key(service.settings, service.store)
    finally:
        service.release()


def test_rights_of_a_folder_that_was_there_stay_and_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o755)
    data_dir.chmod(0o755)
    made = CliRunner().invoke(app, ["keys", "create", "first", "--data-dir", str(data_dir)])
    assert made.exit_code == 0, made.output
    assert {path.stat().st_mode & 0o777 for path in data_dir.glob("store.sqlite*")} == {0o600}
    service = Service(Settings(data_dir=data_dir))
    monkeypatch.setattr(service.jobs, "start", lambda: None)
    try:
        service.start()
    finally:
        service.housekeeping.stop()
        service.release()
    assert data_dir.stat().st_mode & 0o777 == 0o755
    assert {(data_dir / name).stat().st_mode & 0o777 for name in ("files", "runs", "jobs")} == {0o700}
    assert [vars(one)["mode"] for one in caplog.records if one.levelno == logging.WARNING] == ["0755"]
