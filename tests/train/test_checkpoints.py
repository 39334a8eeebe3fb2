"""Checkpoints that verify or do not exist, and runs that go on as if they had never stopped."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from ift_peft.errors import NonFiniteLoss, RunError
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir, RunIsBusy, open_run
from ift_peft.train.checkpoints import (
    MANIFEST,
    PARTIAL,
    REMOVED,
    REQUIRED,
    errors_of_writing,
    faults_of,
    newest_verified,
    rotate,
    set_aside_after,
    tidy,
    writing,
)
from ift_peft.train.resuming import changed_settings, read_progress
from ift_peft.train.run import resume, train
from ift_peft.train.session import Interrupted
from tests.train.small import small

SAVING = ("training.save_strategy=steps", "training.save_steps=5", "training.logging_steps=3")
MADE_ON = {"device": "cpu"}


def write(folder: Path, step: int, text: str = "x", *, best: int | None = None) -> Path:
    with writing(folder, step, made_on=MADE_ON) as partial:
        for name in REQUIRED:
            (partial / name).write_text(text, "utf-8")
        (partial / "trainer_state.json").write_text(json.dumps({"best_global_step": best}), "utf-8")
    return folder / f"checkpoint-{step}"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_half(folder: Path) -> None:
    with writing(folder, 6, made_on=MADE_ON) as partial:
        (partial / "optimizer.pt").write_text("half", "utf-8")
        raise KeyboardInterrupt


def test_a_checkpoint_that_is_not_written_to_its_end_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, 3)
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path)
    assert names(tmp_path) == {"checkpoint-3", "latest"}
    assert newest_verified(tmp_path) == (tmp_path / "checkpoint-3", [])


@pytest.mark.parametrize("name", [*REQUIRED, MANIFEST])
def test_what_has_changed_since_is_named_and_the_one_before_is_taken(tmp_path: Path, name: str) -> None:
    for change in (
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"y" * path.stat().st_size),
    ):
        for step in (9, 10, 100):
            newest = write(tmp_path, step)
        change(newest / name)
        found, (passed_over,) = newest_verified(tmp_path)
        assert found == tmp_path / "checkpoint-10"
        assert passed_over.startswith("checkpoint-100 is passed over: ")
        assert name in passed_over
    assert newest_verified(tmp_path / "checkpoint-9") == (None, [])


def test_a_pickle_that_was_not_written_with_the_checkpoint_is_a_fault(tmp_path: Path) -> None:
    found = write(tmp_path, 3)
    (found / "scaler.pt").write_bytes(b"x")
    assert faults_of(found) == "scaler.pt is not one of its files"


def test_a_checkpoint_whose_best_one_is_broken_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 2, best=2)
    best, newest = write(tmp_path, 4, best=4), write(tmp_path, 6, best=4)
    assert newest_verified(tmp_path) == (newest, [])
    (best / "adapter_model.safetensors").write_text("y", "utf-8")
    found, passed_over = newest_verified(tmp_path)
    assert found == tmp_path / "checkpoint-2"
    assert [line.split(" ")[0] for line in passed_over] == ["checkpoint-6", "checkpoint-4"]
    assert "checkpoint-6 is passed over: its best so far, checkpoint-4, could not be gone back to: " in passed_over[0]
    set_aside_after(tmp_path, 2)
    assert names(tmp_path) == {"checkpoint-2", "broken-checkpoint-4", "broken-checkpoint-6", "latest"}


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_no_memory_for_a_checkpoint_is_no_fault_of_the_disk(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, errors_of_writing(tmp_path):
        raise error
    assert caught.value is error


def test_rotation_goes_by_steps_whatever_the_clock_said_and_spares_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        os.utime(write(tmp_path, step), (10_000 - step, 10_000 - step))
    rotate(tmp_path, 2, best=4)
    assert names(tmp_path) == {"checkpoint-4", "checkpoint-8", "latest"}
    rotate(tmp_path, 1, best=None)
    assert names(tmp_path) == {"checkpoint-8", "latest"}
    assert (tmp_path / "latest").resolve() == tmp_path / "checkpoint-8"


def test_a_kill_while_a_checkpoint_is_replaced_loses_neither_the_old_nor_the_new(tmp_path: Path) -> None:
    old = write(tmp_path, 3, "old")
    (tmp_path / REMOVED).mkdir()
    old.rename(tmp_path / REMOVED / old.name)  # killed after this rename, before the other
    (tmp_path / PARTIAL / old.name).mkdir(parents=True)
    tidy(tmp_path)
    assert names(tmp_path) == {"checkpoint-3", "latest"}
    assert newest_verified(tmp_path)[0] == old
    write(tmp_path, 3, "new")
    assert (old / "optimizer.pt").read_text("utf-8") == "new"
    assert names(tmp_path) == {"checkpoint-3", "latest"}


class At(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step: int, do: Any) -> None:
        self.step, self.do = step, do

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.do()


def interrupt() -> None:
    raise KeyboardInterrupt


def logged(run: RunDir) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in run.read_lines("metrics.jsonl")]


@pytest.mark.parametrize("settings", [(), ("training.gradient_accumulation_steps=2", "training.logging_steps=4")])
def test_a_run_that_goes_on_logs_and_learns_what_it_would_have(tmp_path: Path, settings: tuple[str, ...]) -> None:
    """Stopped between two lines of the log, and between two checkpoints."""
    recipe = small(tmp_path, *SAVING, *settings)
    whole = train(recipe, root=tmp_path / "whole", reporter=Silent())
    with pytest.raises(Interrupted, match="ift train --resume"):
        train(recipe, root=tmp_path / "cut", reporter=Silent(), callbacks=[At(7, interrupt)])
    run = open_run(tmp_path / "cut" / "small", finished=False)
    assert run.status == "interrupted"
    with (run.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')  # cut short by a kill
    resume(run, reporter=Silent())
    assert logged(run) == logged(whole)
    manifest, uninterrupted = run.read("manifest.json"), whole.read("manifest.json")
    assert manifest["resumed"] == [{"from": "checkpoint-5", "passed_over": [], "differs": []}]
    for name in ("adapter_sha256", "order_sha256", "padding_share"):
        assert manifest[name] == uninterrupted[name]
    assert names(run.checkpoints) == {"checkpoint-10", "checkpoint-12", "latest"}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (run.checkpoints / "latest").iterdir())
    assert not (run.checkpoints / "latest" / "training_args.bin").exists()  # a pickle


def test_a_log_that_a_power_cut_tore_is_read_up_to_there(tmp_path: Path) -> None:
    recipe = small(tmp_path, *SAVING)
    with pytest.raises(Interrupted):
        train(recipe, root=tmp_path / "runs", reporter=Silent(), callbacks=[At(7, interrupt)])
    run = open_run(tmp_path / "runs" / "small", finished=False)
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 64 + b'\n{"step": 7, "loss": 1.0}\n')
    left, own = run.path / ".manifest.json.ab_3cd9x", run.path / ".mine.txt"
    for path in (left, own):
        path.write_text("{", "utf-8")  # the first, of a kill while the manifest was written
    resume(run, reporter=Silent())
    assert [line["step"] for line in run.read_lines("metrics.jsonl")] == [3, 6, 9, 12]
    (told,) = run.read("manifest.json")["resumed"][0]["passed_over"]
    assert told.startswith("2 of 4 lines of metrics.jsonl are dropped")
    assert own.is_file() and not left.exists()


@pytest.mark.parametrize("line", ["", "null", "[1]", '{"loss": 1.0}', '{"step": "3"}', '{"step": true}', "\0"])
def test_of_a_log_what_follows_a_line_that_is_none_is_left_out(tmp_path: Path, line: str) -> None:
    run = RunDir(tmp_path)
    assert run.read_metrics() == ([], 0)
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n{{"st', "utf-8")
    assert run.read_metrics() == ([{"step": 1}], 2)


def test_what_is_not_as_when_the_checkpoint_was_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(small(tmp_path, *SAVING), root=tmp_path / "runs", reporter=Silent(), callbacks=[At(7, interrupt)])
    run = open_run(tmp_path / "runs" / "small", finished=False)
    manifest = run.checkpoints / "checkpoint-5" / MANIFEST
    content = json.loads(manifest.read_text("utf-8"))
    content["versions"]["torch"] = "1.0"
    manifest.write_text(json.dumps(content), "utf-8")
    told: list[str] = []
    reporter = Silent()
    reporter.note = told.append  # type: ignore[method-assign]
    resume(run, reporter=reporter)
    (warning,) = (line for line in told if "last bits" in line)
    assert "torch was 1.0, is " in warning
    assert run.read("manifest.json")["resumed"][0]["differs"][0].startswith("torch was 1.0")


@pytest.mark.parametrize("content", ['{"tokens": 3}', "[]", "3"])
def test_progress_of_another_version_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "progress.json").write_text(content, "utf-8")
    with pytest.raises(RunError, match="as this version writes it"):
        read_progress(tmp_path)


def test_a_setting_that_came_with_a_newer_version_is_not_one_that_was_edited() -> None:
    now = {"adapter": {"r": 8, "use_rslora": False}, "training": {"seed": 0, "learning_rate": 1.0}, "validation": None}
    older = {"adapter": {"r": 8}, "training": {"seed": 0}, "validation": None}
    assert changed_settings(older, now) == ["training.learning_rate was not set, is 1.0"]
    assert changed_settings(now, {**now, "adapter": {"r": 16, "use_rslora": False}}) == ["adapter.r was 8, is 16"]
    assert changed_settings(None, now) == []


def test_a_run_that_is_resumed_twice_at_once_is_disturbed_by_neither(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(small(tmp_path, *SAVING), root=tmp_path / "runs", reporter=Silent(), callbacks=[At(7, interrupt)])
    run = open_run(tmp_path / "runs" / "small", finished=False)
    refused = []

    def again() -> None:
        before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
        with pytest.raises(RunIsBusy):
            resume(run, reporter=Silent())
        refused.append(before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()})

    resume(run, reporter=Silent(), callbacks=[At(8, again)])
    assert refused == [True]
    assert run.status == "succeeded"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_base_is_measured_leaves_a_run_to_go_on_with(tmp_path: Path, number: signal.Signals) -> None:
    class Signalled(Silent):
        def stage(self, text: str, total: int) -> None:
            if text.startswith("measuring the base"):
                os.kill(os.getpid(), number)

    with pytest.raises(Interrupted):
        train(small(tmp_path), root=tmp_path / "runs", reporter=Signalled())
    run = open_run(tmp_path / "runs" / "small", finished=False)
    assert run.status == "interrupted"
    assert resume(run, reporter=Silent()).status == "succeeded"
    assert not (run.path / ".reserve").exists()


def test_no_checkpoint_is_written_of_weights_that_are_not_numbers(tmp_path: Path) -> None:
    class Breaking(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 10:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    with pytest.raises(NonFiniteLoss, match="finite adapter weights"):
        train(small(tmp_path, *SAVING), root=tmp_path / "runs", reporter=Silent(), callbacks=[Breaking()])
    run = open_run(tmp_path / "runs" / "small", finished=False)
    assert run.status == "non_finite_loss"
    assert newest_verified(run.checkpoints)[0] == run.checkpoints / "checkpoint-5"
    with pytest.raises(RunError, match="non_finite_loss"):
        open_run(run.path)
