"""A search for the settings that do best on validation rows: trial after trial, and one look at the held-out rows."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ift_peft.durable import write_atomically
from ift_peft.errors import RecipeError, RunError, TrainingError
from ift_peft.evaluate.forgetting import general_texts
from ift_peft.evaluate.gates import reached
from ift_peft.evaluate.measure import check_metrics
from ift_peft.evaluate.safety import safety_prompts
from ift_peft.model.quiet import quiet
from ift_peft.recipe import Recipe, dump_recipe, require_one_task
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir
from ift_peft.selection import Tune, Validation
from ift_peft.train.inputs import inputs_of
from ift_peft.train.run import finish, resume
from ift_peft.tune.asking import Asker, open_study
from ift_peft.tune.budget import Budget
from ift_peft.tune.rows import TrialRows
from ift_peft.tune.search import Search, check_search, default_search, distributions, own_settings, with_settings
from ift_peft.tune.table import best_of, finished, result
from ift_peft.tune.trials import Trials

MOST_REPEATS = 20  # draws in a row of settings that were tried before
REPEATED = "whatever was drawn had been tried before"
# What of the section evaluation decides the trials; the rest says how the best of them is measured at the end.
DECIDING = {"target", "per_device_eval_batch_size", "bootstrap_samples", "confidence", "seed"}
MEASURED = ("accuracy", "precision", "recall", "f1", "loss", "perplexity")


def tune(recipe: Recipe, *, root: Path, fresh: bool, reporter: Reporter) -> RunDir:
    """Search `recipe`'s settings and return the folder of the study, whose study.json names the run of the best.

    The same recipe goes on with its study where that was stopped, and is not searched again where it was finished,
    unless `fresh`. Raises `RecipeError` or `DataError` before anything is trained for a search that cannot be.
    """
    recipe, search = _completed(recipe, reporter)
    folder = RunDir(root / recipe.name / f"tune-{_name(recipe, search)}")
    folder.path.mkdir(parents=True, exist_ok=True)
    with quiet(), folder.locked():
        if fresh:
            for path in (path for path in folder.path.iterdir() if path.name != ".lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if (folder.path / "study.json").is_file() and "run" in folder.read("study.json"):
            reporter.note("this study is finished, and its held-out rows were measured; --fresh starts over")
            if folder.recipe().evaluation != recipe.evaluation:
                reporter.note("they were measured as its recipe said then: evaluation has other settings now")
            return folder
        assert recipe.tune is not None
        budget = Budget(folder.path / "budget.json", recipe.tune.limits)
        with budget.kept():
            study = _Study(recipe, search, budget, folder=folder, root=root, reporter=reporter)
            study.search_all()
            study.measure_best()
    return folder


def _completed(recipe: Recipe, reporter: Reporter) -> tuple[Recipe, Search]:
    """The recipe with `validation` and `tune`, and what is searched. Raises `RecipeError` for what cannot be."""
    require_one_task(recipe, by="a search")
    if recipe.data.streaming:
        raise RecipeError(expected="rows that are read at once", found="data.streaming", fix="data.streaming=false")
    check_metrics(recipe.evaluation, recipe.data.label_words, [])
    general_texts(recipe.evaluation)  # read again when the best is measured; what is wrong with them is told now
    safety_prompts(recipe.evaluation)
    beyond = [metric for metric in recipe.evaluation.target if metric not in MEASURED]
    if beyond:
        raise RecipeError(
            expected=f"evaluation.target of metrics that validation measures: {', '.join(MEASURED)}",
            found=", ".join(beyond),
            fix="name one of them; answers are not generated during training",
        )
    section = recipe.tune or Tune()
    if recipe.validation is None:
        recipe = with_settings(recipe, {"validation": Validation().model_dump(mode="json")})
        reporter.note("the recipe has no section validation: a tenth of the training rows is set aside to choose by")
    search = section.search or default_search(recipe)
    check_search(recipe, search)
    return recipe.model_copy(update={"tune": section}), search


def _name(recipe: Recipe, search: Search) -> str:
    """A hash of all that decides the trials; not of the limits, nor of what is measured when they are over."""
    values = recipe.model_dump(mode="json")
    values["evaluation"] = {name: values["evaluation"][name] for name in sorted(DECIDING)}
    values["tune"] = {name: values["tune"][name] for name in ("prune", "continue_best", "seed")}
    ways = {path: one if isinstance(one, tuple) else one.model_dump() for path, one in search.items()}
    content = json.dumps([values, ways], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


class _Study:
    """A study under way, in its folder, which this process holds."""

    def __init__(
        self, recipe: Recipe, search: Search, budget: Budget, *, folder: RunDir, root: Path, reporter: Reporter
    ) -> None:
        assert recipe.tune is not None and recipe.validation is not None
        self.recipe, self.search, self.folder, self.root, self.reporter = recipe, search, folder, root, reporter
        self.metric = recipe.validation.chosen_metric(labels=bool(recipe.data.label_words))
        self.budget = budget
        self.study = open_study(folder.path, minimize=self.metric == "loss")
        rows, plain = TrialRows(self.study, reporter), with_settings(recipe, {})
        write_atomically(folder.path / "recipe.yaml", dump_recipe(recipe))
        prepared = rows.prepared(plain, 0)
        self._check_inputs(inputs_of(plain, prepared))
        own = own_settings(recipe, list(search), max_length=prepared.max_length)
        self.asker = Asker(self.study, recipe.tune, distributions(search), own, self.budget, reporter.note)
        self.trials = Trials(recipe, self.asker, rows=rows, folder=folder, reporter=reporter)

    def _check_inputs(self, now: dict[str, Any]) -> None:
        """Raises `RunError` where rows, base or template are not those that the study began with."""
        then = self.study.user_attrs.get("inputs")
        if then is None:
            self.study.set_user_attr("inputs", now)
        elif then != now:
            changed = ", ".join(name for name in now if then.get(name) != now[name])
            raise RunError(
                expected="the rows, base and template that the study began with",
                found=f"other values of {changed}",
                fix="restore them, or start over with --fresh",
            )

    def search_all(self) -> None:
        """Run trials until the target is met on validation rows or a limit is reached.

        None where measuring the best on held-out rows had begun: whatever the limits are now, that one is the result.
        """
        if "run" in self.study.user_attrs:
            self.reporter.note(f"the search is over: {self.study.user_attrs['ended_by']}; its best was being measured")
            return
        limits = ", ".join(f"{limit:g} {name}" for name, limit in self.budget.limits.items())
        self.reporter.note(f"searching {', '.join(self.search)} by validation {self.metric}, for {limits}")
        repeats, why = 0, self._over()
        while (trial := self.asker.running()) is not None or why is None:
            trial = trial or self.asker.next()
            same = self.asker.same_as(trial)
            repeats = repeats + 1 if same is not None else 0
            if same is not None:
                self.trials.repeat(trial, same)
            else:
                self.trials.run(trial)
            self.folder.write("study.json", self._result())
            why = self._over() or (REPEATED if repeats == MOST_REPEATS else None)
        self.study.set_user_attr("ended_by", why)
        self.reporter.note(f"the search is over: {why}")

    def _over(self) -> str | None:
        """Why no trial comes any more; None where one does."""
        if self.study.user_attrs.get("ended_by") == REPEATED:
            return REPEATED
        best = best_of(self.study)
        if best is not None and self.recipe.evaluation.target:
            scores = best.user_attrs["scores"]
            if all(reached(name, scores[name], aim) for name, aim in self.recipe.evaluation.target.items()):
                return "the target is met on the validation rows"
        limit = self.budget.exceeded(finished(self.study))
        return None if limit is None else f"the limit of {self.budget.limits[limit]:g} {limit} is reached"

    def measure_best(self) -> None:
        """Measure the best trial on the held-out rows, once, and write it as a run.

        Raises `TrainingError` where no trial has a score, and `RunError` where the run that was begun is of another
        trial than the best.
        """
        best = best_of(self.study)
        if best is None:
            raise TrainingError(
                expected="a trial with a validation score",
                found=f"none of {finished(self.study)} trials; see {self.folder.path / 'study.json'}",
                fix="raise the limits, or mend what the trials failed of; then --fresh",
            )
        self.reporter.note(f"measuring trial {best.number}, the best by validation {self.metric}, on the held-out rows")
        begun = self.study.user_attrs.get("run")
        run = None if begun is None or not Path(begun).is_dir() else RunDir(Path(begun))
        if run is not None and not run.read("manifest.json").get("training_ended"):
            shutil.rmtree(run.path)  # killed while it was set up
            run = None
        measured = best.number if run is None else run.read("manifest.json")["tune"]["trial"]
        if measured != best.number:
            raise RunError(
                expected=f"the run of trial {best.number}, the best",
                found=f"that of trial {measured} in {self.study.user_attrs['run']}",
                fix="search again: ift tune --fresh",
            )
        if run is not None and run.status != "succeeded" and run.recipe() != self.trials.recipe_of(best):
            self.reporter.note(f"{run.path} was measured as the recipe said before; it is measured anew")
            shutil.rmtree(run.path)
            run = None
        if run is not None:  # killed while it was measured, or after
            run = run if run.status == "succeeded" else resume(run, reporter=self.reporter)
        else:
            origin = {"study": self.folder.path.name, "trial": best.number, "continues": self.asker.ancestors(best)}
            run = finish(
                self.trials.recipe_of(best),
                trained=self.trials.folder_of(best.number),
                entries={"tune": origin},
                root=self.root,
                created=lambda run: self.study.set_user_attr("run", str(run.path.resolve())),
                reporter=self.reporter,
            )
        self.folder.write("study.json", self._result(run))

    def _result(self, run: RunDir | None = None) -> dict[str, Any]:
        return result(self.study, self.recipe, self.metric, self.budget, self.folder, run)
