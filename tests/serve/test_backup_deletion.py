"""A tuned model through a deletion of its rows, and through a back-up: it answers as before."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from ift_peft.errors import RunError
from ift_peft.infer.load import load_model, open_parts
from ift_peft.infer.predict import generate
from ift_peft.recipe import load_recipe
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.serve.operations.backup import restore_backup, write_backup
from ift_peft.serve.security.keys import create_key
from ift_peft.serve.store.tables import jobs, models
from ift_peft.train.run import train
from tests.conftest import Ift
from tests.serve.inside import Inside, serving
from tests.serve.test_files import add_job, row

MARKER = "琥珀色的灯塔"  # in every row, and nowhere else
ROWS = b"".join(row(f"{MARKER}{number}?", f"{MARKER}很好") for number in range(16))
RECIPE = """
name: ftjob-1
base: {model: tiny, device: cpu}
adapter: {r: 4, embeddings: true}
data: {train: rows.jsonl, test_size: 3, quality: {}}
training: {max_steps: 4, per_device_train_batch_size: 4, learning_rate: 2.0e-3, logging_steps: 1, seed: 0}
evaluation: {forgetting: false, bootstrap_samples: 100}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run over the rows, with the predictions and the report that quote them."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "rows.jsonl").write_bytes(ROWS)
    (folder / "recipe.yaml").write_text(RECIPE, "utf-8")
    return train(load_recipe(str(folder / "recipe.yaml")), root=folder / "runs", reporter=Silent())


@pytest.fixture
def service(tmp_path: Path, trained: RunDir) -> Iterator[Inside]:
    """With a file, the job that used it, and its tuned model."""
    with serving(tmp_path / "data") as running:
        kept = running.client().files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        run = f"runs/ftjob-1/{trained.path.name}"
        shutil.copytree(trained.path, running.data_dir / run)
        add_job(running, kept.id, status="succeeded", run=run)
        named = {"id": "ftckpt-1", "name": "ft:tiny:local::abcdefgh", "created_at": 1, "job": "ftjob-1", "base": "tiny"}
        with running.service.store.begin() as connection:
            connection.execute(insert(models).values(**named, run=run, adapter=f"{run}/adapter"))
        yield running


def answer(run: Path) -> str:
    parts = open_parts(RunDir(run))
    model, _ = load_model(parts)
    question = parts.converse([{"role": "user", "content": "1 + 1?"}])
    return generate(model, parts, question.messages, max_new_tokens=12)


def quoting(folder: Path) -> list[str]:
    """Files below `folder` that hold the marker: as it is, as JSON or as HTML writes it."""
    texts = (MARKER.encode(), json.dumps(MARKER)[1:-1].encode(), MARKER.encode("utf-16-le"))
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(text in path.read_bytes() for text in texts)
    ]


@pytest.mark.slow
def test_rows_of_a_deleted_file_are_gone_from_runs_that_still_answer(service: Inside) -> None:
    (run,) = (service.data_dir / "runs" / "ftjob-1").iterdir()
    before = answer(run)
    assert {"golden.json", "test.jsonl", "predictions.jsonl", "report.html"} <= {
        Path(name).name for name in quoting(service.data_dir)
    }
    service.client().files.delete(service.client().files.list().data[0].id)
    assert quoting(service.data_dir) == []
    assert answer(run) == before
    assert RunDir(run).read("golden.json")["messages"][0]["content"].startswith("What is two plus two?")
    assert RunDir(run).is_whole
    assert "accuracy" in (run / "report.html").read_text("utf-8") or "loss" in (run / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_a_deletion_that_a_crash_cut_short_is_done_at_the_next_start(tmp_path: Path, trained: RunDir) -> None:
    with serving(tmp_path / "data") as running:
        shutil.copytree(trained.path, running.data_dir / "runs" / "ftjob-1" / trained.path.name)
        add_job(running, "file-deleted", status="succeeded", run=f"runs/ftjob-1/{trained.path.name}")
    assert quoting(tmp_path / "data")
    with serving(tmp_path / "data"):
        assert quoting(tmp_path / "data") == []


@pytest.mark.slow
def test_a_restored_folder_answers_as_before(service: Inside, ift: Ift, tmp_path: Path) -> None:
    """Taken while the service runs and files come and go."""
    store = service.service.store
    _, key = create_key(store, "laptop", scopes=["read", "write"])
    client = service.client(key)
    listed = client.files.list().data
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            client.files.delete(client.files.create(file=("more.jsonl", ROWS), purpose="fine-tune").id)

    busy = threading.Thread(target=come_and_go)
    busy.start()
    try:
        done = ift("backup", "--data-dir", str(service.data_dir), "--to", str(tmp_path / "copy.tar"))
    finally:
        stop.set()
        busy.join()
    assert done.returncode == 0, done.stderr
    (run,) = (service.data_dir / "runs" / "ftjob-1").iterdir()
    before = answer(run)
    new = tmp_path / "new"
    restored = ift("restore", str(tmp_path / "copy.tar"), "--data-dir", str(new))
    assert restored.returncode == 0, restored.stderr
    again = ift("restore", str(tmp_path / "copy.tar"), "--data-dir", str(new))
    assert again.returncode == 5 and "an empty folder" in again.stderr
    with serving(new) as second:
        here = second.client(key)
        assert {one.id for one in listed} <= {one.id for one in here.files.list()}
        for one in here.files.list():
            assert here.files.content(one.id).content == ROWS, "every record has its content"
        assert second.service.store.every(select(models)) == store.every(select(models))
        assert second.service.store.every(select(jobs)) == store.every(select(jobs))
    assert answer(new / run.relative_to(service.data_dir)) == before


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    with serving(tmp_path / "small") as running:
        running.client().files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        made = write_backup(running.data_dir, tmp_path / "small.tar")
        assert made.files == 2
        with pytest.raises(RunError, match="one that exists"):
            write_backup(running.data_dir, tmp_path / "small.tar")
    return tmp_path / "small.tar"


def rewritten(archive: Path, name: str, content: bytes | None, *, kind: bytes = tarfile.REGTYPE) -> Path:
    """The archive with one more member in front; or without the member `name`, where there is no content."""
    target = archive.with_name("other.tar")
    with tarfile.open(archive) as old, tarfile.open(target, "w") as new:
        if content is not None:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
            new.addfile(info, io.BytesIO(content))
        for member in old:
            if content is not None or member.name != name:
                new.addfile(member, old.extractfile(member))
    return target


def test_a_backup_that_is_not_whole_makes_no_folder(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as tar:
        (file_name,) = (name for name in tar.getnames() if name.startswith("files/"))
    broken = tmp_path / "cut.tar"
    broken.write_bytes(archive.read_bytes()[:-9_000])
    flipped = bytearray(archive.read_bytes())
    flipped[flipped.index(MARKER.encode())] ^= 1
    (tmp_path / "flipped.tar").write_bytes(flipped)
    (tmp_path / "text.tar").write_text("no tar at all", "utf-8")
    cases = [broken, tmp_path / "flipped.tar", tmp_path / "text.tar"]
    for case in cases:
        with pytest.raises(RunError):
            restore_backup(case, tmp_path / "new")
    for name, content, kind in (
        ("../outside", b"x", tarfile.REGTYPE),
        ("/outside", b"x", tarfile.REGTYPE),
        ("files/../../outside", b"x", tarfile.REGTYPE),
        ("files/link", b"", tarfile.SYMTYPE),
        ("files/hard", b"", tarfile.LNKTYPE),
        ("files/pipe", b"", tarfile.FIFOTYPE),
        ("files/more", b"x", tarfile.REGTYPE),
        (file_name, b"x", tarfile.REGTYPE),
        (file_name, None, tarfile.REGTYPE),
        ("store.sqlite", None, tarfile.REGTYPE),
        ("manifest.json", None, tarfile.REGTYPE),
    ):
        with pytest.raises(RunError):
            restore_backup(rewritten(archive, name, content, kind=kind), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("**/outside")) and not list(tmp_path.glob(".new.*"))
    restore_backup(archive, tmp_path / "new")
    assert (tmp_path / "new" / file_name).read_bytes() == ROWS
