"""The rows of trials: rendered once for all trials that take the same, and the same validation rows for every one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import optuna

from ift_peft.errors import RecipeError
from ift_peft.recipe import Recipe
from ift_peft.reporter import Reporter
from ift_peft.train.prepare import Prepared, prepare

# What `prepare` takes of the section `training`.
PREPARED_FROM = (
    "max_length",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)


@dataclass
class TrialReporter:
    """Stages, and notes once it trains, under the trial's number; earlier notes are told once in all."""

    reporter: Reporter
    number: int
    told: set[str]
    training: bool = False

    def note(self, text: str) -> None:
        if self.training:
            self.reporter.note(f"trial {self.number}: {text}")
        elif text not in self.told:
            self.told.add(text)
            self.reporter.note(text)

    def stage(self, text: str, total: int) -> None:
        self.training = self.training or text == "training"
        self.reporter.stage(f"trial {self.number}: {text}", total)

    def advance(self, done: int, detail: str = "") -> None:
        self.reporter.advance(done, detail)

    def finish(self) -> None:
        self.reporter.finish()


class TrialRows:
    """Prepares the rows of a study's trials."""

    def __init__(self, study: optuna.Study, reporter: Reporter) -> None:
        self.study, self._reporter = study, reporter
        self._told: set[str] = set()
        self._last: tuple[str, Prepared] | None = None

    def reporter(self, number: int) -> TrialReporter:
        """What a trial reports to."""
        return TrialReporter(self._reporter, number, self._told)

    def prepared(self, recipe: Recipe, number: int) -> Prepared:
        """Rows and renderings, those of the trial before where nothing that they are made of differs.

        Raises `RecipeError` where a trial's settings change which rows are validated on.
        """
        values = recipe.model_dump(mode="json")
        values["training"] = {name: values["training"].get(name) for name in PREPARED_FROM}
        values["adapter"] = values["adapter"]["target_modules"]
        key = json.dumps(values, sort_keys=True)
        if self._last is None or self._last[0] != key:
            self._last = key, prepare(recipe, self.reporter(number))
        prepared = self._last[1]
        assert prepared.validation is not None
        places = sorted([row.where, row.answer] for row in prepared.validation.rows)
        found = hashlib.sha256(json.dumps(places).encode()).hexdigest()
        before = self.study.user_attrs.get("validation_rows")
        if before is None:
            self.study.set_user_attr("validation_rows", found)
        elif before != found:
            raise RecipeError(
                expected="tune.search over settings that leave the validation rows as they are",
                found=f"others in trial {number}",
                fix="search no settings of data that add or remove rows",
            )
        return prepared
