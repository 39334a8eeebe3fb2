"""Runs that are made of several: each trained once, however often it is asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ift_peft.data.rows import raise_faults
from ift_peft.errors import IftPeftError, RunError, faults_of
from ift_peft.recipe import Recipe
from ift_peft.report.write import write_report
from ift_peft.reporter import Reporter, Silent
from ift_peft.run_dir import Kind, RunDir, RunIsBusy, create_run, runs_called, versions
from ift_peft.train.prepare import prepare
from ift_peft.train.run import all_inputs, resume, train
from ift_peft.train.session import Interrupted


def inputs_of(parts: dict[str, Recipe]) -> dict[str, dict[str, Any]]:
    """The hashes of what each run is made of. Raises what is wrong with any of them, all together."""
    faults: list[IftPeftError] = []
    found = {}
    for name, recipe in parts.items():
        try:
            found[name] = all_inputs(recipe, prepare(recipe, Silent()))
        except IftPeftError as error:
            faults += faults_of(name, error)
    raise_faults(faults)
    return found


@contextmanager
def made_of_parts(recipe: Recipe, kind: Kind, root: Path, *, into: RunDir | None) -> Iterator[RunDir]:
    """A run below `root` of several others, or `into`, which did not finish; its manifest says how it ended.

    Raises `Interrupted` with the command that goes on after a signal.
    """
    run = create_run(recipe, root) if into is None else into
    started = time.monotonic()
    try:
        with run.locked():
            run.update_manifest(kind=kind, parts={}, status="running", error=None)
            yield run
    except (Interrupted, KeyboardInterrupt) as error:
        run.update_manifest(status="interrupted")
        raise Interrupted(
            expected="all parts to be trained and measured",
            found=getattr(error, "found", "it was interrupted"),
            fix=f"go on with: ift train --resume {os.path.relpath(run.path)}",
        ) from None
    except RunIsBusy:
        raise
    except BaseException as error:
        run.update_manifest(status="failed", error=f"{type(error).__name__}: {error}"[:2000])
        raise
    finished = datetime.now().astimezone().isoformat(timespec="seconds")
    run.update_manifest(status="succeeded", finished=finished, seconds=round(time.monotonic() - started, 1))
    write_report(run)


def add_part(run: RunDir, name: str, part: RunDir) -> None:
    """Record that the run `part` is that part of `run`."""
    parts = run.read("manifest.json")["parts"]
    run.update_manifest(parts={**parts, name: os.path.relpath(part.path, run.path)})


def unfinished(run: RunDir) -> RunDir:
    """The run, where it can be gone on with. Raises `RunError` where it succeeded or another process is at it."""
    with run.locked():
        pass
    if run.status == "succeeded":
        raise RunError(expected="an unfinished run", found=f"{run.path} has succeeded", fix="train again: ift train")
    return run


def found_or_trained(recipe: Recipe, inputs: dict[str, Any], root: Path, reporter: Reporter, *, told: str) -> RunDir:
    """The run of `recipe` below `root`: an earlier one of the same `inputs`, finished if it was not, or a new one."""
    for run in earlier_runs(recipe, inputs, root):
        called = f"{run.path.parent.name}/{run.path.name}"
        if run.status != "succeeded":
            finished = resume(run, reporter=reporter)  # raises where another process is at it
            reporter.note(f"{told}: went on with {called}")
            return finished
        if run.is_whole:
            reporter.note(f"{told}: trained before, {called}")
            return run
        reporter.note(f"{told}: {called} is not as training left it, and is not taken")
    reporter.note(told)
    return train(recipe, root=root, reporter=reporter)


def earlier_runs(recipe: Recipe, inputs: dict[str, Any], root: Path) -> list[RunDir]:
    """Runs of the same settings, inputs and versions: those that succeeded, then the interrupted; the newest first.

    Rows and base are compared by content: where their files lie may have changed.
    """
    found = []
    for run in runs_called(root, recipe.name):
        entries = run.read("manifest.json")
        same = entries.get("inputs") == inputs and entries.get("versions") == versions()
        if same and entries.get("status") in ("succeeded", "interrupted", "running"):
            found += [run] if _settings(run.recipe()) == _settings(recipe) else []
    return sorted(found, key=lambda run: run.status != "succeeded")


def _settings(recipe: Recipe) -> dict[str, Any]:
    """All of a recipe but words about it, and places whose content is among the inputs of a run."""
    values = recipe.model_dump(mode="json", exclude={"description": True, "base": {"model", "revision"}})
    for part in (values["data"], *values["data"]["sources"]):
        part.pop("train"), part.pop("test")
    return values
