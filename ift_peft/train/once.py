"""Runs that are made of several: each trained once, however often it is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ift_peft.data.rows import raise_faults
from ift_peft.environment import versions
from ift_peft.errors import IftPeftError, RunError, faults_of
from ift_peft.recipe import Recipe
from ift_peft.report.write import NAME as REPORT
from ift_peft.report.write import write_report
from ift_peft.reporter import Reporter
from ift_peft.run_dir import GOES_ON, Kind, RunDir, create_run, runs_called
from ift_peft.run_ending import ending
from ift_peft.train.inputs import inputs_of
from ift_peft.train.prepare import Prepared, prepare
from ift_peft.train.run import resume, train
from ift_peft.train.session import Interrupted, resume_command
from ift_peft.train.signals import ending_on_signals


@dataclass(frozen=True)
class Part:
    """One of several runs, before it is made: its recipe, its rows, and the hashes of what it is made of."""

    recipe: Recipe
    prepared: Prepared
    inputs: dict[str, Any]


def prepare_parts(recipes: Mapping[str, Recipe], reporter: Reporter) -> dict[str, Part]:
    """The parts of these names. Raises what is wrong with any of them, all together."""
    faults: list[IftPeftError] = []
    found = {}
    for name, recipe in recipes.items():
        try:
            prepared = prepare(recipe, reporter)
            found[name] = Part(recipe, prepared, inputs_of(recipe, prepared))
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
    try:
        with run.locked(), ending(run), ending_on_signals():
            run.update_manifest(kind=kind, parts={}, status="running", error=None)
            yield run
    except (Interrupted, KeyboardInterrupt) as error:
        raise Interrupted(
            expected="all parts to be trained and measured",
            found=getattr(error, "found", "it was interrupted"),
            fix=f"go on with: {resume_command(run)}",
        ) from None
    write_report(run)


def add_part(run: RunDir, name: str, part: RunDir) -> None:
    """Record that the run `part` is that part of `run`."""
    parts = run.read("manifest.json")["parts"]
    run.update_manifest(parts={**parts, name: os.path.relpath(part.path, run.path)})


def unfinished(run: RunDir) -> RunDir:
    """The run, where it can be gone on with. Raises `RunError` where it succeeded or another process is at it.

    One that was killed before its report was written is measured again: its parts are taken as they are.
    """
    with run.locked():
        pass
    if run.status == "succeeded" and (run.path / REPORT).is_file():
        raise RunError(expected="an unfinished run", found=f"{run.path} has succeeded", fix="train again: ift train")
    return run


def found_or_trained(
    part: Part, root: Path, *, told: str, reporter: Reporter, step_timeout: float | None = None
) -> RunDir:
    """The run of `part` below `root`: an earlier one of the same inputs, finished if it was not, or a new one."""
    for run in earlier_runs(part, root):
        called = f"{run.path.parent.name}/{run.path.name}"
        if run.status != "succeeded":
            finished = resume(
                run, reporter=reporter, step_timeout=step_timeout
            )  # raises where another process is at it
            reporter.note(f"{told}: went on with {called}")
            return finished
        if run.is_whole:
            reporter.note(f"{told}: trained before, {called}")
            return run
        reporter.note(f"{told}: {called} is not as training left it, and is not taken")
    reporter.note(told)
    return train(part.recipe, root=root, reporter=reporter, prepared=part.prepared, step_timeout=step_timeout)


def earlier_runs(part: Part, root: Path) -> list[RunDir]:
    """Runs of the settings, inputs and versions of `part`: the succeeded, then the interrupted; the newest first.

    Rows and base are compared by content: where their files lie may have changed.
    """
    found = []
    for run in runs_called(root, part.recipe.name):
        entries = run.read("manifest.json")
        same = entries.get("inputs") == part.inputs and entries.get("versions") == versions()
        if same and entries.get("status") in ("succeeded", *GOES_ON):
            found += [run] if _settings(run.recipe()) == _settings(part.recipe) else []
    return sorted(found, key=lambda run: run.status != "succeeded")


def _settings(recipe: Recipe) -> dict[str, Any]:
    """All of a recipe but words about it, and places whose content is among the inputs of a run."""
    values = recipe.model_dump(mode="json", exclude={"description": True, "base": {"model", "revision"}})
    for part in (values["data"], *values["data"]["sources"]):
        part.pop("train"), part.pop("test")
    return values
