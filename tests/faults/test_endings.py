"""How training ends where it goes wrong: never as a success, and saying why."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from ift_peft.errors import NonFiniteLoss
from ift_peft.model.tokenizer import TINY
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir, runs_called
from ift_peft.train import room
from ift_peft.train.checkpoints import checkpoints_in
from ift_peft.train.run import train
from tests.conftest import Ift
from tests.faults.conftest import Observed
from tests.faults.forks import Forked, Forks
from tests.train.small import small, write_small

ODD = "zebra"  # a text whose tokens no other row has


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = bool(metafunc.config.getoption("--all-faults"))
    if "rate" in metafunc.fixturenames:
        metafunc.parametrize("rate", ["1e6", "1e2"] if every else ["1e6"])
    if "value" in metafunc.fixturenames:
        metafunc.parametrize("value", ["nan", "inf"] if every else ["nan"])
    if "stopped" in metafunc.fixturenames:
        moments = [("SIGTERM", "training"), ("SIGINT", "training"), ("SIGINT", "measuring the base")]
        metafunc.parametrize(("stopped", "moment"), moments if every else moments[:1])


def the_run(folder: Path) -> RunDir:
    return runs_called(folder / "runs", "small")[0]


def losses(run: RunDir) -> list[float]:
    return [line["loss"] for line in run.read_lines("metrics.jsonl") if "loss" in line]


def odd_base(folder: Path, value: float) -> Path:
    """The built-in base with an input embedding full of `value` for the tokens of `ODD`, and a head of its own."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    used = set(tokenizer(ODD)["input_ids"]) - set(tokenizer((folder / "rows.jsonl").read_text("utf-8"))["input_ids"])
    assert used
    with torch.no_grad():
        model.get_input_embeddings().weight[sorted(used)] = value
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


@pytest.mark.fault(
    "endings",
    "a row with a token whose embedding is {value}",
    expected="exit code 10, non_finite_loss, file and line named, no adapter",
)
def test_a_row_that_is_not_finite_is_named(value: str, tmp_path: Path, ift: Ift, observed: Observed) -> None:
    write_small(tmp_path)
    base = odd_base(tmp_path, float(value))
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as rows:
        rows.write(json.dumps({"text": f"这{ODD}", "label": "正面"}, ensure_ascii=False) + "\n")
    steps = ["training.max_steps=40", "training.save_strategy=steps", "training.save_steps=1"]
    ended = ift("train", "small.yaml", f"base.model={base}", *steps, "adapter.embeddings=false")
    run = the_run(tmp_path)
    error = run.read("manifest.json")["error"]
    assert (ended.returncode, run.status) == (10, "non_finite_loss"), ended.stderr
    assert "1 of its 4 rows by itself: rows.jsonl:61" in error and "Traceback" not in ended.stderr
    assert not run.adapter.exists()
    kept = [path.name for path in checkpoints_in(run.checkpoints)]
    assert f"the last good checkpoint is {kept[0]}" in error
    for name in kept:
        weights = load_file(run.checkpoints / name / "adapter_model.safetensors")
        assert all(bool(torch.isfinite(one).all()) for one in weights.values())
    named = error.partition("; ")[2].partition("fix")[0].strip()
    observed(f"exit code 10, {run.status}, {named}; {kept[0]} is left")


class OddGradient(TrainerCallback):
    """Makes the gradient infinite, and not the loss, of rows that hold the token `odd`."""

    def __init__(self, odd: int) -> None:
        self.odd = odd

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        def spoil(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            bad = (inputs[0] == self.odd).any(dim=1)[:, None, None]
            if output.requires_grad:
                output.register_hook(lambda gradient: torch.where(bad, torch.inf, gradient))

        model.get_input_embeddings().register_forward_hook(spoil)


@pytest.mark.fault(
    "endings",
    "a row whose loss is finite and its gradient is not",
    expected="non_finite_loss, the row named",
    rare=True,
)
def test_a_row_with_an_infinite_gradient_is_named(tmp_path: Path, observed: Observed) -> None:
    recipe = small(tmp_path, "training.max_steps=40")
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as rows:
        rows.write(json.dumps({"text": f"这{ODD}", "label": "正面"}, ensure_ascii=False) + "\n")
    odd = AutoTokenizer.from_pretrained(TINY)(ODD)["input_ids"][-1]
    with pytest.raises(NonFiniteLoss, match=r"1 of its 4 rows by itself: rows\.jsonl:61") as caught:
        train(recipe, root=tmp_path / "runs", reporter=Silent(), callbacks=[OddGradient(odd)])
    assert "loss nan" not in caught.value.found and the_run(tmp_path).status == "non_finite_loss"
    observed(f"{the_run(tmp_path).status}: {caught.value.found}")


@pytest.mark.fault(
    "endings", "learning rate 1e38: weights beyond float32", expected="exit code 10, the weights blamed and no row"
)
def test_weights_that_are_lost_are_not_blamed_on_rows(tmp_path: Path, ift: Ift, observed: Observed) -> None:
    write_small(tmp_path)
    ended = ift("train", "small.yaml", "training.learning_rate=1e38")
    run = the_run(tmp_path)
    error = run.read("manifest.json")["error"]
    assert (ended.returncode, run.status) == (10, "non_finite_loss")
    assert "every one of its 4 rows" in error and "rows.jsonl" not in error and not run.adapter.exists()
    assert "lower training.learning_rate" in error
    observed(f"exit code 10, {run.status}: in every one of its 4 rows; lower training.learning_rate")


@pytest.mark.fault("endings", "learning rate {rate} in 12 steps", expected="exit code 11, diverged, no adapter")
def test_a_loss_stuck_at_guessing_is_no_success(rate: str, tmp_path: Path, ift: Ift, observed: Observed) -> None:
    write_small(tmp_path)
    ended = ift("train", "small.yaml", f"training.learning_rate={rate}")
    run = the_run(tmp_path)
    assert (ended.returncode, run.status) == (11, "diverged"), ended.stderr
    assert "guessing among 8,192 (9.01)" in run.read("manifest.json")["error"] and not run.adapter.exists()
    observed(f"exit code 11, {run.status} after {len(losses(run))} logged steps, loss {losses(run)[-1]:.2f}")


LONG = ("train", "small.yaml", "training.max_steps=2000", "training.logging_steps=1")


def wait_for(there: Callable[[], bool], process: Forked) -> None:
    """Wait until `there` is true of a process that goes on meanwhile."""
    end = time.monotonic() + 300
    while not there():
        assert process.poll() is None and time.monotonic() < end, (process.phase, process.stderr)
        time.sleep(0.05)


def logged(folder: Path) -> bool:
    return any(path.stat().st_size for path in folder.glob("runs/small/2*/metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.fault(
    "endings",
    "a step that does not end",
    expected="exit code 14, hung, the stacks of all threads, an adapter of none",
    rare=True,
)
def test_a_step_that_hangs_is_ended(tmp_path: Path, server: Forks, observed: Observed) -> None:
    write_small(tmp_path)
    process = server.run(cwd=tmp_path, target="tests.faults.terminals:hang")
    run = the_run(tmp_path)
    assert (process.returncode, run.status) == (14, "hung"), process.stderr
    stacks = (run.path / "hung.txt").read_text("utf-8")
    assert "on_step_begin" in stacks and stacks.count("(most recent call first)") > 1 and not run.adapter.exists()
    assert "error: expected a step within 2 s" in process.stderr and "in step 4" in run.read("manifest.json")["error"]
    observed("exit code 14, hung, in step 4; hung.txt names on_step_begin")


@pytest.mark.slow
@pytest.mark.fault("endings", "{stopped} while {moment}", expected="exit code 130, interrupted, the command to go on")
def test_a_signal_is_no_success(stopped: str, moment: str, tmp_path: Path, server: Forks, observed: Observed) -> None:
    write_small(tmp_path)
    process = server.start(*LONG, cwd=tmp_path)

    def there() -> bool:
        if moment == "training":
            return logged(tmp_path)
        return any('"disk"' in one.read_text("utf-8") for one in tmp_path.glob("runs/*/2*/manifest.json"))

    wait_for(there, process)
    process.send_signal(getattr(signal, stopped))
    process.wait()
    run, told = the_run(tmp_path), process.stderr
    assert (process.returncode, run.status) == (130, "interrupted"), told
    assert "go on with: ift train --resume runs/small/" in told and "Traceback" not in told
    if moment == "training":
        assert f"{stopped}: stopping after this step" in told and checkpoints_in(run.checkpoints)
    observed(f"exit code 130, {run.status}, told how to go on")


def interrupted(run: RunDir, process: Forked) -> str:
    """That a training whose words nobody heard was interrupted, with a checkpoint of its last step; what was seen."""
    manifest = run.read("manifest.json")
    assert (process.returncode, manifest["status"]) == (130, "interrupted"), manifest.get("error")
    newest = checkpoints_in(run.checkpoints)[0]
    assert newest.name == f"checkpoint-{len(losses(run))}"
    return f"exit code {process.returncode}, {run.status}, a checkpoint of the last step"


@pytest.mark.slow
@pytest.mark.fault(
    "endings",
    "the terminal is closed in training: SIGHUP, and every write to it fails",
    expected="exit code 130, interrupted, a checkpoint",
)
def test_a_terminal_that_is_closed_is_no_failure(tmp_path: Path, server: Forks, observed: Observed) -> None:
    write_small(tmp_path)
    ours, theirs = pty.openpty()
    process = server.start(os.ttyname(theirs), *LONG, cwd=tmp_path, target="tests.faults.terminals:on_terminal")
    shown = b""

    def trains() -> bool:
        nonlocal shown
        while select.select([ours], [], [], 0)[0]:  # else it would wait for room
            shown += os.read(ours, 65536)
        return logged(tmp_path)

    wait_for(trains, process)
    os.close(theirs)
    os.close(ours)
    process.wait()
    assert b"training" in shown and not process.stderr
    observed(interrupted(the_run(tmp_path), process))


@pytest.mark.slow
@pytest.mark.fault(
    "endings",
    "SIGINT where the reader of stderr, such as tee, has gone before",
    expected="exit code 130, interrupted, a checkpoint",
    rare=True,
)
def test_a_reader_that_is_gone_is_no_failure(tmp_path: Path, server: Forks, observed: Observed) -> None:
    write_small(tmp_path)
    process = server.start(*LONG, cwd=tmp_path, target="tests.faults.terminals:into_pipe_without_reader")
    wait_for(lambda: logged(tmp_path), process)
    process.send_signal(signal.SIGINT)
    process.wait()
    observed(interrupted(the_run(tmp_path), process))


@pytest.mark.slow
@pytest.mark.fault(
    "endings",
    "a watched process is stopped for longer than --step-timeout, and goes on",
    expected="it succeeds: nothing hung",
    rare=True,
)
def test_a_process_that_was_stopped_did_not_hang(tmp_path: Path, server: Forks, observed: Observed) -> None:
    write_small(tmp_path)
    process = server.start(cwd=tmp_path, target="tests.faults.terminals:train_slowly")
    wait_for(lambda: logged(tmp_path), process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)  # the timeout is 2
    assert process.poll() is None and process.phase == "training"
    process.send_signal(signal.SIGCONT)
    process.wait()
    run = the_run(tmp_path)
    assert (process.returncode, run.status) == (0, "succeeded"), process.stderr
    assert not (run.path / "hung.txt").exists()
    observed("succeeded, after 5 s of standing still with a timeout of 2 s")


@pytest.mark.fault(
    "endings", "a disk with less room than the run will take", expected="exit code 12 before a run folder exists"
)
def test_too_little_room_is_told_before_the_start(
    tmp_path: Path, ift: Ift, monkeypatch: pytest.MonkeyPatch, observed: Observed
) -> None:
    write_small(tmp_path)
    asked = []

    def little(folder: Path) -> int:
        asked.append(folder)
        return 100_000

    monkeypatch.setattr(room, "free_room", little)
    ended = ift("train", "small.yaml")
    assert (ended.returncode, asked) == (12, [(tmp_path / "runs").resolve()]), ended.stderr
    assert "0.1 MB free" in ended.stderr and "Traceback" not in ended.stderr and not (tmp_path / "runs").exists()
    observed("DiskFull, exit code 12, no folder")
