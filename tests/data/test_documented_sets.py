"""The lines of docs/recipes.md, run on the public sets up to their tokens."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ift_peft.data.classify import make_renderer
from ift_peft.data.fit import fit_rows
from ift_peft.data.instructions import ask_held_out, askers
from ift_peft.data.rows import read_rows
from ift_peft.evaluate.measure import check_evaluation
from ift_peft.model.tokenizer import TINY
from ift_peft.recipe import load_recipe
from tests.conftest import ROOT

LINES = [
    line.strip()
    for line in (ROOT / "docs" / "recipes.md").read_text("utf-8").splitlines()
    if line.startswith("    ift train ")
]


def found(shared: Path, name: str) -> str:
    """The file of a documented name among the shared sets."""
    (path,) = (shared / "data").rglob(name) if "/" not in name else [shared / "data" / name]
    return str(path)


@pytest.mark.parametrize("line", LINES, ids=[line.split()[2] for line in LINES])
def test_a_documented_line_reads_its_set_as_rows_of_the_recipe(shared: Path, line: str) -> None:
    _, _, name, *overrides = shlex.split(line)
    for number, override in enumerate(overrides):
        key, _, value = override.partition("=")
        if key in ("data.train", "data.test") and value != "null":
            overrides[number] = f"{key}={found(shared, value)}"
    recipe = load_recipe(name, [*overrides, "data.max_train_rows=40", "data.max_test_rows=40"])
    _, test = read_rows(recipe.data)
    check_evaluation(recipe.data, recipe.evaluation, test, unseen=None)
    renderer = make_renderer(
        AutoTokenizer.from_pretrained(TINY), head=recipe.base.head, classes=recipe.data.label_words
    )
    fitted = fit_rows(ask_held_out(test, askers(recipe.data)), renderer, max_length=512, overlong="truncate")
    assert len(fitted.rows) == 40
    assert all(row.prompt[-1]["content"].strip() and row.answer.strip() for row in fitted.rows)
    if recipe.data.label_words:
        assert {row.answer for row in fitted.rows} <= set(recipe.data.label_words)
    if "pass_at_k" in recipe.evaluation.metrics:
        assert all("assert" in (row.tests or "") for row in fitted.rows)


def test_there_is_a_line_for_every_task_that_ships() -> None:
    assert {line.split()[2] for line in LINES} == {
        *("qa", "translation", "summarization", "code", "sst2", "sst2-classifier", "topics", "chat")
    }
