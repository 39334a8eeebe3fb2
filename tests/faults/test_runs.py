"""Several processes in one run folder, folders that cannot be written, and records that were torn or edited."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Observed
from tests.faults.forks import Arm
from tests.faults.test_checkpoints import flip
from tests.faults.trained import Lab, found, in_its_save, losses, refused, said, succeeded

pytestmark = pytest.mark.slow


@pytest.mark.fault(
    "runs",
    "a run is resumed while another process trains in it",
    expected="the second is refused, exit code 5; the first comes to the same end as if it were alone",
)
def test_resumed_twice(lab: Lab, tmp_path: Path, observed: Observed) -> None:
    run = lab.half_done(tmp_path)
    first = lab.start_resuming(run, arm=Arm(save=1, signal=signal.SIGSTOP))
    in_its_save(first)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    second = lab.resume(run)
    refused(second, 5)
    told = found(second, "found", "another process training in it")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    first.send_signal(signal.SIGCONT)
    first.wait()
    succeeded(first)
    said(first, "resuming from checkpoint-4")
    lab.check_same(run)
    observed(f"the second: {told}; no file of the run changed by it, the first came to the same end")


@pytest.mark.fault(
    "runs",
    "three processes resume one run at the same moment",
    expected="one trains to the same end, the others are refused",
    rare=True,
)
def test_resumed_at_once(lab: Lab, tmp_path: Path, observed: Observed) -> None:
    run = lab.half_done(tmp_path)
    processes = [lab.start_resuming(run) for _ in range(3)]
    codes = sorted(process.wait() for process in processes)
    assert codes == [0, 5, 5], [process.stderr for process in processes]
    for process in processes:
        if process.returncode:
            refused(process, 5)
        else:
            said(process, "resuming from checkpoint-4")
    lab.check_same(run)
    observed(f"exit codes {codes}; the same end")


@pytest.mark.fault(
    "runs",
    "two trainings of one recipe begin at the same moment in one folder of runs",
    expected="each has a folder of its own and comes to the same end; `latest` points at one of them",
    rare=True,
)
def test_trained_twice(lab: Lab, tmp_path: Path, observed: Observed) -> None:
    both = [lab.start_training(tmp_path / "runs") for _ in range(2)]
    for process in both:
        process.wait()
        succeeded(process)
    runs = [path for path in (tmp_path / "runs" / "small").iterdir() if not path.is_symlink()]
    assert len(runs) == 2
    for run in runs:
        lab.check_same(run)
    assert (tmp_path / "runs" / "small" / "latest").resolve() in runs
    observed(f"{len(runs)} folders, the same end in each, `latest` at one of them")


@pytest.mark.fault(
    "runs", "the folder of runs is read-only", expected="an error that names it, and nothing written", rare=True
)
def test_read_only_runs(lab: Lab, tmp_path: Path, observed: Observed) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    runs.chmod(0o555)
    process = lab.train(runs, unprivileged=True)
    runs.chmod(0o755)
    refused(process, 5)
    said(process, "found", str(runs))
    assert not list(runs.iterdir())
    observed(found(process))


@pytest.mark.parametrize("name", ["run", "checkpoints"])
@pytest.mark.fault(
    "runs",
    "the {name} folder of a run that is resumed is read-only",
    expected="an error that names it; writable again, the run resumes to the same end",
    rare=True,
)
def test_read_only_run(lab: Lab, tmp_path: Path, observed: Observed, name: str) -> None:
    run = lab.half_done(tmp_path)
    folder = run if name == "run" else run / name
    folder.chmod(0o555)
    process = lab.resume(run, unprivileged=True)
    folder.chmod(0o755)
    refused(process, 5)
    said(process, "found", str(folder))
    lab.go_on(run)
    observed(f"{found(process)}; then the same end")


@pytest.mark.fault(
    "runs",
    "the last line of metrics.jsonl is torn, as by a crash of the machine",
    expected="the run resumes; the line is dropped, and the steps are there once each",
)
def test_torn_line(lab: Lab, tmp_path: Path, observed: Observed) -> None:
    run = lab.half_done(tmp_path)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 7, "loss": 0.5, "note": "读'.encode()[:-1])
    lab.go_on(run)
    observed(f"resumed to the same end, with {len(losses(run))} whole lines")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"status": 3}', "\x00\x00\x00"],
    ids=["empty", "torn", "list", "null", "other", "zeros"],
)
@pytest.mark.fault(
    "runs",
    "manifest.json of a run is {content!r}",
    expected="resuming, asking and listing runs say so; no traceback",
    rare=True,
)
def test_broken_manifest(lab: Lab, tmp_path: Path, observed: Observed, content: str) -> None:
    run = lab.half_done(tmp_path)
    (run / "manifest.json").write_text(content, "utf-8")
    resumed = lab.resume(run)
    refused(resumed, 5)
    asked = lab.start("predict", str(run), "很好")
    asked.wait()
    refused(asked, 5)
    listed = lab.start("runs", "--runs-dir", str(tmp_path))
    listed.wait()
    assert "Traceback" not in listed.stderr, listed.stderr
    rows = [line.split("│")[1:3] for line in listed.stdout.splitlines() if line.startswith("│")]
    name = "".join(path.strip() for path, _ in rows)  # a long path goes over several lines
    assert listed.returncode == 0 and name.endswith(run.name), (listed.stdout, listed.stderr)
    status = rows[0][1].strip()
    assert status == ("3" if "3" in content else "unreadable")
    observed(f"{found(resumed)}; it is listed as {status}")


@pytest.mark.parametrize(
    ("edit", "expected"),
    [("learning_rate: 0.002", "learning_rate: 0.001"), ("training:", "training: {[")],
    ids=["learning rate", "broken"],
)
@pytest.mark.fault(
    "runs",
    "recipe.yaml of a run is edited before it is resumed: {edit} becomes {expected}",
    expected="refused with what differs: the run would not be the one that began",
    rare=True,
)
def test_edited_recipe(lab: Lab, tmp_path: Path, observed: Observed, edit: str, expected: str) -> None:
    run = lab.half_done(tmp_path)
    text = (run / "recipe.yaml").read_text("utf-8")
    assert text.count(edit) == 1, text
    (run / "recipe.yaml").write_text(text.replace(edit, expected), "utf-8")
    resumed = lab.resume(run)
    refused(resumed, 5 if expected.endswith("0.001") else 2)
    said(resumed, "found", "learning_rate was 0.002, is 0.001" if expected.endswith("0.001") else "recipe.yaml:")
    (run / "recipe.yaml").write_text(text, "utf-8")
    lab.go_on(run)
    observed(f"{found(resumed)}; with the recipe restored, the same end")


@pytest.mark.fault(
    "runs",
    "an unfinished run is moved elsewhere, and `latest` dangles",
    expected="it resumes there to the same end; `latest` is refused; the next training sets it right",
    rare=True,
)
def test_moved(lab: Lab, tmp_path: Path, observed: Observed) -> None:
    run = lab.half_done(tmp_path / "runs")
    latest = run.parent / "latest"
    latest.symlink_to(run.name)
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.move(run, moved)
    dangling = lab.resume(latest)
    refused(dangling, 5)
    lab.go_on(moved)
    succeeded(lab.train(tmp_path / "runs"))
    assert (latest / "manifest.json").is_file()
    observed(f"`latest`: {found(dangling)}; resumed in its new place to the same end; `latest` set right")


@pytest.mark.parametrize("kind", ["a file", "a folder"])
@pytest.mark.fault(
    "runs",
    "`latest` in the folder of runs is {kind}, not a link",
    expected="an error before training; what is there stays",
    rare=True,
)
def test_latest_is_no_link(lab: Lab, tmp_path: Path, observed: Observed, kind: str) -> None:
    latest = tmp_path / "runs" / "small" / "latest"
    latest.parent.mkdir(parents=True)
    own = latest if kind == "a file" else latest / "mine"
    own.parent.mkdir(exist_ok=True)
    own.write_text("mine", "utf-8")
    process = lab.train(tmp_path / "runs")
    refused(process, 5)
    assert own.read_text("utf-8") == "mine"
    told = found(process)
    assert process.phase == "preparing" and not list((tmp_path / "runs").glob("*/2*"))
    own.unlink()
    if kind != "a file":
        latest.rmdir()
    succeeded(lab.train(tmp_path / "runs"))
    observed(f"{told}; out of the way, the recipe trains")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.fault(
    "runs",
    "a bit of {name} flipped after the run succeeded",
    expected="predict, evaluate, merge and export refuse it, exit code 5",
    rare=True,
)
def test_flipped_adapter(lab: Lab, tmp_path: Path, observed: Observed, name: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(next((lab.folder / "undisturbed" / "small").glob("2*")), run)
    flip(run / "adapter" / name)
    commands = [("predict", str(run), "很好"), ("evaluate", str(run)), ("merge", str(run))]
    commands.append(("export", str(run), "--to", "peft"))
    for command in commands:
        process = lab.start(*command)
        process.wait()
        refused(process, 5)
        told = found(process, "expected", name)
    observed(f"refused by all four, {told}")
