"""Runs that are made of several: each trained once, however often it is asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ift_peft.data.rows import raise_faults
from ift_peft.errors import IftPeftError, RunError, faults_of
from ift_peft.recipe import Recipe, dump_recipe
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
        if run.status == "succeeded":
            reporter.note(f"{told}: trained before, {run.path.parent.name}/{run.path.name}")
            return run
        with suppress(RunIsBusy):
            reporter.note(f"{told}: going on with {run.path.parent.name}/{run.path.name}")
            return resume(run, reporter=reporter)
    reporter.note(told)
    return train(recipe, root=root, reporter=reporter)


def earlier_runs(recipe: Recipe, inputs: dict[str, Any], root: Path) -> list[RunDir]:
    """Runs of the same settings, inputs and versions: those that succeeded, then the interrupted; the newest first."""
    found = []
    wanted = dump_recipe(recipe)
    for run in runs_called(root, recipe.name):
        entries = run.read("manifest.json")
        same = entries.get("inputs") == inputs and entries.get("versions") == versions()
        if not same or entries.get("status") not in ("succeeded", "interrupted", "running"):
            continue
        if dump_recipe(run.recipe()) == wanted:
            found.append(run)
    return sorted(found, key=lambda run: run.status != "succeeded")
