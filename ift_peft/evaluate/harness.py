"""Tasks of EleutherAI's lm-evaluation-harness on the base and the adapter of a run, and what the adapter changed.

The harness asks, scores and gives standard errors (Gao et al., doi:10.5281/zenodo.12608602); loading is ours, with its
checks that base and adapter are those of the run, and so is the paired interval of each change.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import AutoTokenizer

from ift_peft.errors import DataError, IftPeftError, RecipeError, RunError, first_line
from ift_peft.evaluate.harness_output import told_to
from ift_peft.evaluate.intervals import Estimate
from ift_peft.evaluate.metrics import Resampling
from ift_peft.evaluate.rowwise import compared, mean, with_ones
from ift_peft.infer.load import Parts, load_model, open_parts
from ift_peft.model.quiet import quiet
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir

Who = Literal["base", "adapter"]
BOTH: tuple[Who, ...] = ("base", "adapter")


def harness_scores(
    run: RunDir,
    tasks: Sequence[str],
    *,
    who: Sequence[Who] = BOTH,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    apply_chat_template: bool = False,
    batch_size: int = 32,
    resampling: Resampling,
    reporter: Reporter,
) -> dict[str, Any]:
    """Scores of `tasks` by name, of `who` of base and adapter, each with the harness's standard error.

    With both, `change` of each score; with the interval of a paired bootstrap over the task's samples where the score
    is their mean. `limit` takes the first samples of each task; `include_path` is a folder of more tasks' YAML files.
    Raises `IftPeftError` without the harness, `RecipeError` for tasks it does not know, `DataError` for tasks that
    cannot be read, and `RunError` for a run that is not as it was trained.
    """
    _require_harness()
    parts = open_parts(run)
    if parts.recipe.base.head != "causal-lm":
        raise RunError(
            expected="a run whose base continues texts, as the harness asks",
            found=f"base.head: {parts.recipe.base.head}",
            fix="measure it on rows: ift evaluate RUN --data FILE",
        )
    with told_to(reporter) as notes, quiet():
        manager = _load_tasks(tasks, include_path)
        model, loading = load_model(parts)
        found = {}
        for one in who:
            with nullcontext() if one == "adapter" else model.disable_adapter():
                found[one] = _measured(
                    model,
                    parts,
                    tasks,
                    manager,
                    limit=limit,
                    num_fewshot=num_fewshot,
                    apply_chat_template=apply_chat_template,
                    batch_size=batch_size,
                    resamples=resampling.samples,
                )
    for note in (*loading, *(_chat_notes(parts) if apply_chat_template else ()), *notes()):
        reporter.note(note)
    return {
        "tasks": {name: _scores(name, found, resampling) for name in found[who[0]]["results"]},
        "intervals": f"{100 * resampling.confidence:g} % intervals of change: paired bootstrap over samples "
        f"({resampling.samples} resamples); ± is the harness's standard error",
        "settings": {
            "limit": limit,
            "num_fewshot": num_fewshot,
            "apply_chat_template": apply_chat_template,
            "include_path": include_path is not None,
        },
        "versions": {name: metadata.version(name) for name in ("lm_eval", "datasets", "transformers")},
    }


def _require_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise IftPeftError(
            expected="lm-evaluation-harness", found=first_line(error), fix="pip install 'ift_peft[lm-eval]'"
        ) from None


def _load_tasks(names: Sequence[str], include_path: Path | None) -> Any:
    """A task manager that has the tasks of these names loaded, so that base and adapter are asked the same."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise RunError(expected="--include-path to be a folder", found=str(include_path), fix="check the path")
    known: set[str] = set()
    # Its own thousands of task files take a while to read: only where the folder given does not hold all that is asked.
    for defaults in (False, True) if include_path is not None else (True,):
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        known = set(manager.all_tasks)
        if known.issuperset(names):
            break
    require_known(names, known)
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # whatever a task's own code and the data set libraries raise
        raise DataError(
            expected=f"tasks that can be read: {', '.join(names)}",
            found=first_line(error),
            fix="check their YAML and data; data sets of the Hub are fetched once with the network on",
        ) from error
    manager.load = lambda _: loaded
    return manager


def require_known(names: Sequence[str], known: Collection[str]) -> None:
    """Raises `RecipeError` for `names` that are none of the `known` tasks, with the nearest to the first."""
    unknown = [name for name in names if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=3)
        raise RecipeError(
            expected="tasks, groups or tags of the harness",
            found=", ".join(unknown),
            fix=f"did you mean {' or '.join(near)}?" if near else "list them with: lm-eval ls tasks",
        )


def _measured(
    model: Any,
    parts: Parts,
    tasks: Sequence[str],
    manager: Any,
    *,
    limit: int | None,
    num_fewshot: int | None,
    apply_chat_template: bool,
    batch_size: int,
    resamples: int,
) -> Any:
    """What the harness's own `simple_evaluate` makes of a model as it stands."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(parts.run.adapter, trust_remote_code=False, local_files_only=True)
    thinking = False if _generation_prompt(parts) == "enable_thinking=false" else None
    asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, enable_thinking=thinking)
    try:
        return simple_evaluate(
            model=asked,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            log_samples=True,
            bootstrap_iters=resamples,
        )
    except ValueError as error:
        raise RecipeError(
            expected="tasks that can be asked of this model", found=first_line(error), fix="choose other tasks"
        ) from error


def _generation_prompt(parts: Parts) -> str:
    return str(parts.run.read("manifest.json").get("generation_prompt"))


def _chat_notes(parts: Parts) -> list[str]:
    if _generation_prompt(parts) != "prefix":
        return []
    return ["the chat template begins an answer otherwise than the rows of training do"]


def _scores(task: str, found: dict[Who, Any], resampling: Resampling) -> dict[str, Any]:
    """Each score of one task: `value` and `stderr` of base and adapter, and `change`."""
    first = next(iter(found.values()))
    values = {who: results["results"][task] for who, results in found.items()}
    scores: dict[str, Any] = {}
    for key, value in first["results"][task].items():
        metric, _, choice = key.partition(",")
        if not choice or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        own: dict[str, Any] = {}
        for who, results in values.items():
            stderr = results.get(f"{metric}_stderr,{choice}")
            own[who] = {"value": results[key], "stderr": stderr if isinstance(stderr, int | float) else None}
        if len(found) == len(BOTH):
            change = _change(task, metric, choice, found, resampling)
            own["change"] = change.to_json() if change else {"value": own["adapter"]["value"] - own["base"]["value"]}
        scores[metric if choice == "none" else key] = own
    samples = first.get("samples", {}).get(task)
    counts = {"samples": len({line["doc_id"] for line in samples})} if samples else {}
    about = {
        name: first[table][task]
        for name, table in (("version", "versions"), ("num_fewshot", "n-shot"))
        if task in first[table]
    }
    return {**counts, **about, "scores": scores}


def _change(task: str, metric: str, choice: str, found: dict[Who, Any], resampling: Resampling) -> Estimate | None:
    """Adapter minus base with its interval; None for a score that is no mean over samples, as of groups and corpora."""
    by_row = []
    for who in BOTH:
        lines = [line for line in found[who].get("samples", {}).get(task, ()) if line["filter"] == choice]
        lines.sort(key=lambda line: int(line["doc_id"]))
        given = [line.get(metric) for line in lines]
        if not given or not all(isinstance(one, bool | int | float | np.number) for one in given):
            return None
        row = np.array(given, dtype=np.float64)
        if not np.isclose(row.mean(), found[who]["results"][task][f"{metric},{choice}"]):
            return None
        by_row.append(with_ones(row))
    return compared(*by_row, score=mean, resampling=resampling).change
