"""All stages of a pipeline trained, each once: what was trained before of the same rows and settings is taken."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ift_peft.data.rows import raise_faults
from ift_peft.errors import IftPeftError, RunError, faults_of
from ift_peft.evaluate.gates import missed
from ift_peft.evaluate.pipeline import evaluate_pipeline, held_out_requests
from ift_peft.recipe import Recipe, dump_recipe, stage_recipes
from ift_peft.report.write import write_report
from ift_peft.reporter import Reporter, Silent
from ift_peft.run_dir import RunDir, RunIsBusy, create_run, versions
from ift_peft.train.prepare import prepare
from ift_peft.train.run import all_inputs, resume, train
from ift_peft.train.session import Interrupted


def train_pipeline(recipe: Recipe, *, root: Path, reporter: Reporter, into: RunDir | None = None) -> RunDir:
    """Train every stage of `recipe`, measure them together, and return the folder of the pipeline below `root`.

    Stages have folders of their own, <root>/<recipe>.<stage>; one whose settings, rows, base and versions are those
    of an earlier run is that run, or goes on with it. `into` is the folder of a pipeline that was interrupted.

    Raises `RecipeError`, `DataError` or `ModelError` for the faults of all stages before any is trained.
    """
    stages = stage_recipes(recipe)
    hashes = stage_inputs(stages)
    held_out_requests(recipe)
    run = create_run(recipe, root) if into is None else into
    run.update_manifest(stages={}, status="running", error=None)
    started = time.monotonic()
    try:
        with run.locked():
            for number, (name, own) in enumerate(stages.items(), start=1):
                done = _found_or_trained(own, hashes[name], root, reporter, told=f"stage {number}/{len(stages)} {name}")
                kept = {**run.read("manifest.json")["stages"], name: os.path.relpath(done.path, run.path)}
                run.update_manifest(stages=kept)
            scores = evaluate_pipeline(run, reporter=reporter, keep=True)
            run.write("scores.json", scores)
    except (Interrupted, KeyboardInterrupt) as error:
        run.update_manifest(status="interrupted")
        raise Interrupted(
            expected="all stages to be trained and measured",
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
    return run


def resume_pipeline(run: RunDir, *, reporter: Reporter) -> RunDir:
    """Go on with an unfinished pipeline. Raises `RunError` for one that succeeded or that another process is at."""
    with run.locked():
        pass
    if run.status == "succeeded":
        raise RunError(
            expected="an unfinished pipeline", found=f"{run.path} has succeeded", fix="train again: ift train"
        )
    return train_pipeline(run.recipe(), root=run.path.parent.parent, reporter=reporter, into=run)


def missed_stages(run: RunDir) -> list[IftPeftError]:
    """An error for each gate that a stage's adapter missed."""
    faults: list[IftPeftError] = []
    for name, path in run.read("manifest.json")["stages"].items():
        for fault in missed(RunDir(run.path / path).read("scores.json")):
            faults += faults_of(f"stage {name}", fault)
    return faults


def stage_inputs(stages: dict[str, Recipe]) -> dict[str, dict[str, Any]]:
    """The hashes of what each stage is made of. Raises what is wrong with any of them, all together."""
    faults: list[IftPeftError] = []
    found = {}
    for name, recipe in stages.items():
        try:
            found[name] = all_inputs(recipe, prepare(recipe, Silent()))
        except IftPeftError as error:
            faults += faults_of(f"stage {name}", error)
    raise_faults(faults)
    return found


def _found_or_trained(recipe: Recipe, inputs: dict[str, Any], root: Path, reporter: Reporter, *, told: str) -> RunDir:
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
    """Runs of the same settings, inputs and versions that succeeded, or that were interrupted; the newest first."""
    found = []
    wanted = dump_recipe(recipe)
    for manifest in (root / recipe.name).glob("*/manifest.json"):
        if manifest.parent.is_symlink():
            continue
        run = RunDir(manifest.parent)
        entries = run.read("manifest.json")
        same = entries.get("inputs") == inputs and entries.get("versions") == versions()
        if not same or entries.get("status") not in ("succeeded", "interrupted", "running"):
            continue
        if dump_recipe(run.recipe()) == wanted:
            found.append(run)
    return sorted(found, key=lambda run: (run.status == "succeeded", run.path.name), reverse=True)
