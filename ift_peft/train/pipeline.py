"""All stages of a pipeline trained, each once: what was trained before of the same rows and settings is taken."""

from __future__ import annotations

from pathlib import Path

from ift_peft.evaluate.pipeline import evaluate_pipeline, held_out_requests
from ift_peft.recipe import Recipe, stage_recipes
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir
from ift_peft.train.once import add_part, found_or_trained, made_of_parts, prepare_parts


def train_pipeline(
    recipe: Recipe,
    *,
    root: Path,
    reporter: Reporter,
    into: RunDir | None = None,
    step_timeout: float | None = None,
) -> RunDir:
    """Train every stage of `recipe`, measure them together, and return the folder of the pipeline below `root`.

    Stages have folders of their own, <root>/<recipe>.<stage>; one whose settings, rows, base and versions are those
    of an earlier run is that run, or goes on with it. `into` is the folder of a pipeline that was interrupted.

    Raises `RecipeError`, `DataError` or `ModelError` for the faults of all stages before any is trained.
    """
    stages = prepare_parts({f"stage {name}": own for name, own in stage_recipes(recipe).items()}, reporter)
    held_out_requests(recipe)
    with made_of_parts(recipe, "pipeline", root, into=into) as run:
        for number, (name, own) in enumerate(stages.items(), start=1):
            told = f"{name} ({number} of {len(stages)})"
            made = found_or_trained(own, root, told=told, reporter=reporter, step_timeout=step_timeout)
            add_part(run, name.partition(" ")[2], made)
        run.write("scores.json", evaluate_pipeline(run, reporter=reporter, keep=True))
    return run
