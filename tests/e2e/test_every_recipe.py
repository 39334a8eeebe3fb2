"""Every recipe that ships, trained for two steps on the built-in base and measured by its own metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from ift_peft.recipe import load_recipe, shipped_recipes
from ift_peft.reporter import Silent
from ift_peft.train.run import train

FEW = (
    "base.device=cpu",
    "data.max_train_rows=16",
    "data.max_test_rows=4",
    "training.max_steps=2",
    "training.per_device_train_batch_size=4",
    "evaluation.max_new_tokens=8",
    "evaluation.bootstrap_samples=100",
)
METRICS = {
    "exact_match": ("exact_match",),
    "f1": ("f1",),
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "pass_at_k": ("pass@1",),
}
# tests/e2e/test_data_recipes.py and test_run.py look at these more closely
ELSEWHERE = {"sentiment", "sentiment-diverse", "sentiment-augmented"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(shipped_recipes().keys() - ELSEWHERE))
def test_a_recipe_trains_and_is_measured(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name, FEW)
    run = train(recipe, root=tmp_path, reporter=Silent())
    scores = run.read("scores.json")
    wanted = {metric for metric in recipe.evaluation.metrics for metric in METRICS[metric]}
    wanted |= {"accuracy", "f1"} if recipe.data.labels else {"loss", "perplexity"}
    for who in ("base", "adapter", "change"):
        assert wanted - {"perplexity"} <= scores[who].keys()
        for part in scores[who].values():
            assert part["low"] <= part["value"] <= part["high"]
    assert scores["rows"] == 4
    assert run.read("manifest.json")["steps"] == 2
