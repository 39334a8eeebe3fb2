"""The proof, on a recipe and a machine of one's own, that a run which was killed ends as one which was not.

Two runs of the same recipe, in processes of their own: one is left alone, the other is killed with SIGKILL at random
moments and gone on with, and then the two are compared: loss of every step, bits of every weight, rows in their order.
Imports no torch.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ift_peft.durable import write_atomically
from ift_peft.environment import versions
from ift_peft.errors import RecipeError, TrainingError
from ift_peft.recipe import Recipe, dump_recipe, require_one_task
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir, open_run
from ift_peft.train.checkpoints import PARTIAL
from ift_peft.train.signals import ending_on_signals

SAVES = 5  # checkpoints in a run, about
LOOK_SECONDS = 0.01


@dataclass(frozen=True)
class Kill:
    """One kill: the last step that was logged before it, whether a checkpoint was being written, and what came then."""

    after_step: int
    writing: bool
    resumed_from: str | None
    passed_over: list[str]


@dataclass(frozen=True)
class Verdict:
    """What the comparison found. `first_loss` is the first step whose loss differs, `tensors` those that differ."""

    steps: int
    kills: list[Kill]
    first_loss: int | None
    tensors: list[str]
    same_order: bool
    same_scores: bool
    deterministic: bool = True
    """False where two runs that nobody killed differ as well."""
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def equal(self) -> bool:
        return self.first_loss is None and not self.tensors and self.same_order and self.same_scores


def shortened(recipe: Recipe, *, steps: int, rows: int) -> Recipe:
    """`recipe` for `steps` optimizer steps with some checkpoints among them, every loss logged, few rows measured.

    With 0 steps it is trained as long as it says. Raises `RecipeError` for one of several tasks.
    """
    require_one_task(recipe, by="verify-resume")
    if steps < 0 or 0 < steps < 3:
        raise RecipeError(expected="at least 3 steps", found=f"--steps {steps}", fix="--steps 20, or 0 for all")
    training: dict[str, Any] = {**recipe.training, "logging_steps": 1}
    updated: dict[str, Any] = {}
    every = max(1, steps // SAVES)
    if steps:
        training["max_steps"] = steps
        training.pop("num_train_epochs", None)
        if recipe.validation is None:
            training |= {"save_strategy": "steps", "save_steps": every}
        else:
            updated["validation"] = recipe.validation.model_copy(update={"every": every})
    data = recipe.data
    if rows and (data.max_test_rows is None or data.max_test_rows > rows):
        updated["data"] = data.model_copy(update={"max_test_rows": rows})
    evaluation = recipe.evaluation.model_copy(update={"forgetting": False})
    return recipe.model_copy(update={"training": training, "evaluation": evaluation, **updated})


def verify_resume(recipe: Recipe, *, kills: int, seed: int, folder: Path, reporter: Reporter) -> Verdict:
    """Train `recipe` below `folder` once undisturbed and once with `kills` kills, and compare the two.

    The moments are drawn with `seed`; every second one is in a save. Where the two differ, a third run tells whether
    the machine repeats itself. Raises `TrainingError` with the trainer's words where a run does not succeed, and where
    one ended before it could be killed so often. A signal that asks to stop ends the trainers too.
    """
    with ending_on_signals():  # else the trainers, in sessions of their own, would outlive it
        return _proven(recipe, kills=kills, seed=seed, folder=folder, reporter=reporter)


def _proven(recipe: Recipe, *, kills: int, seed: int, folder: Path, reporter: Reporter) -> Verdict:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    write_atomically(path, dump_recipe(recipe))
    reporter.note("training without a kill")
    whole = _to_its_end(_start(["train", str(path)], folder / "whole"), folder / "whole")
    steps = int(whole.read("manifest.json")["steps"])
    killed, found = _killed(path, folder / "killed", steps, kills=kills, seed=seed, reporter=reporter)
    verdict = compare(whole, killed, found)
    if verdict.equal:
        return verdict
    reporter.note("the two differ; training once more without a kill, to see whether this machine repeats itself")
    again = _to_its_end(_start(["train", str(path)], folder / "again"), folder / "again")
    return Verdict(**{**vars(verdict), "deterministic": compare(whole, again, []).equal})


def compare(one: RunDir, other: RunDir, kills: Sequence[Kill]) -> Verdict:
    """How two runs of one recipe differ."""
    losses = [
        {line["step"]: line["loss"] for line in run.read_lines("metrics.jsonl") if "loss" in line}
        for run in (one, other)
    ]
    differing = [step for step in sorted({*losses[0], *losses[1]}) if losses[0].get(step) != losses[1].get(step)]
    manifests = [run.read("manifest.json") for run in (one, other)]
    scores = [run.read("scores.json") for run in (one, other)]
    return Verdict(
        steps=int(manifests[0]["steps"]),
        kills=list(kills),
        first_loss=differing[0] if differing else None,
        tensors=_differing_tensors(one.adapter, other.adapter),
        same_order=manifests[0]["order_sha256"] == manifests[1]["order_sha256"],
        same_scores=scores[0]["adapter"] == scores[1]["adapter"],
    )


def _differing_tensors(one: Path, other: Path) -> list[str]:
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return sorted(
        name
        for name in {*ours, *theirs}
        if name not in ours or name not in theirs or not ours[name].equal(theirs[name])
    )


def _killed(
    recipe: Path, root: Path, steps: int, *, kills: int, seed: int, reporter: Reporter
) -> tuple[RunDir, list[Kill]]:
    """A run that is killed until it has been often enough, and then left to end."""
    draw = random.Random(seed)
    moments: list[tuple[int, bool]] = []
    process = _start(["train", str(recipe)], root)
    try:
        while len(moments) < kills:
            run = _await_run(process, root)
            wanted = draw.randint(1, max(1, (steps - _last_step(run)) // (kills - len(moments) + 1))) + _last_step(run)
            if not _await_moment(process, run, wanted, draw.random(), in_save=len(moments) % 2 == 1):
                break  # it had ended before; how, and how often it was killed, is looked at below
            writing = (run.checkpoints / PARTIAL).is_dir()
            _kill(process)
            moments.append((_last_step(run), writing))
            reporter.note(f"killed after step {moments[-1][0]}{', while a checkpoint was written' if writing else ''}")
            process = _start(["train", "--resume", str(run.path)], root)
        run = _to_its_end(process, root)
    finally:
        if process.poll() is None:
            _kill(process)
    if len(moments) < kills:
        raise TrainingError(
            expected=f"{kills} kills",
            found=f"{len(moments)}: the run had ended before the next",
            fix="--steps with more, or fewer --kills",
        )
    resumed = run.read("manifest.json").get("resumed", [])
    return run, [
        Kill(step, writing, told["from"], told["passed_over"])
        for (step, writing), told in zip(moments, resumed, strict=True)
    ]


def _await_moment(process: subprocess.Popen[bytes], run: RunDir, step: int, later: float, *, in_save: bool) -> bool:
    """Wait until a step is logged, and then for a part of a step, or for a checkpoint that is being written.

    Whether the process is still there to be killed.
    """
    while process.poll() is None and _last_step(run) < step:
        time.sleep(LOOK_SECONDS)
    if not in_save:
        time.sleep(later * 20 * LOOK_SECONDS)
    while in_save and process.poll() is None and not (run.checkpoints / PARTIAL).is_dir():
        time.sleep(LOOK_SECONDS / 10)
    return process.poll() is None


def _kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _start(command: Sequence[str], root: Path) -> subprocess.Popen[bytes]:
    root.mkdir(parents=True, exist_ok=True)
    with (root / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ift_peft", *command, "--runs-dir", str(root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _await_run(process: subprocess.Popen[bytes], root: Path) -> RunDir:
    while process.poll() is None:
        found = sorted(root.glob("*/latest/manifest.json"))
        if found:
            return RunDir(found[0].parent.resolve())
        time.sleep(LOOK_SECONDS)
    return _to_its_end(process, root)


def _last_step(run: RunDir) -> int:
    """The last step whose loss was logged: beside these there are lines of validation."""
    return max((int(line["step"]) for line in run.read_metrics()[0] if "loss" in line), default=0)


def _to_its_end(process: subprocess.Popen[bytes], root: Path) -> RunDir:
    try:
        code = process.wait()
    except BaseException:
        _kill(process)
        raise
    if code not in (0, 8):  # 8: a target or gate of the recipe is missed, by a whole run
        told = (root / "log").read_text("utf-8", errors="replace").strip().splitlines()[-12:]
        raise TrainingError(
            expected="a run that succeeds", found=f"exit code {code}:\n" + "\n".join(told), fix="as it says there"
        )
    (found,) = {path.parent.resolve() for path in root.glob("*/latest/manifest.json")}
    return open_run(found)


def to_json(verdict: Verdict) -> dict[str, Any]:
    return {"equal": verdict.equal, **asdict(verdict)}
