"""The recipe of several adapters combined: every arm measured on every domain as its own run was."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ift_peft.data.rows import read_rows
from ift_peft.errors import Faults, RecipeError, RunError
from ift_peft.evaluate.compare import predict_rows
from ift_peft.infer.ensemble import together
from ift_peft.infer.load import held_out_rows, load_members, open_parts
from ift_peft.merging import train_merging
from ift_peft.recipe import Recipe, load_recipe, parent_recipes
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir, open_run
from ift_peft.sections import Data, Source
from ift_peft.train.once import found_or_trained, prepare_parts
from tests.e2e.test_every_recipe import FEW
from tests.train.small import small

pytestmark = pytest.mark.slow
WARM = {"cold": "snow and ice", "warm": "sun and sand"}


def recipe(folder: Path, *overrides: str) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("more", range(12)), ("held", range(20, 24))):
        rows = [{"text": f"{word} {number}", "label": label} for label, word in WARM.items() for number in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    weather = {
        "data": {
            "train": str(folder / "more.jsonl"),
            "test": str(folder / "held.jsonl"),
            "labels": ["cold", "warm"],
            "instruction": "Cold or warm?",
        },
        "training": {"max_steps": 8},
    }
    parents = {"goods": {}, "weather": weather}
    ways = [{"method": "linear"}, {"method": "linear", "weights": [1, 0]}, {"method": "ties", "density": 0.3}]
    own = (f"merging.parents={json.dumps(parents)}", f"merging.combine={json.dumps(ways)}", "training.max_steps=6")
    return small(folder, *own, *overrides)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merging") / "runs"


@pytest.fixture(scope="module")
def run(root: Path) -> RunDir:
    return train_merging(recipe(root.parent / "rows"), root=root, reporter=Silent())


def test_every_arm_scores_on_its_domain_what_its_own_run_scored(run: RunDir) -> None:
    scores = run.read("scores.json")
    assert {name: own["rows"] for name, own in scores["domains"].items()} == {"goods": 4, "weather": 8}
    for domain, own in scores["domains"].items():
        alone = run.parts[domain].read("scores.json")
        assert own["arms"][domain]["score"] == alone["adapter"]["accuracy"]
        assert own["arms"]["base"]["score"] == alone["base"]["accuracy"]
        assert own["arms"][domain]["change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
        for name in ("together", "linear", "ties, density 0.3"):
            whole = run.parts[name].read("scores.json")["by_source"]
            source = next(source for source in whole if source.endswith(domain))
            assert own["arms"][name]["score"] == whole[source]["adapter"]["accuracy"]
        assert own["arms"]["linear, 1 0"]["score"] == own["arms"]["goods"]["score"]
        values = [own["arms"]["together"]["score"]["value"] for own in scores["domains"].values()]
        assert scores["mean"]["together"] == pytest.approx(sum(values) / 2, abs=1e-6)


def test_ensembles_are_of_what_the_parents_hold_likely(run: RunDir) -> None:
    parents = [open_parts(run.parts[name]) for name in ("goods", "weather")]
    model, names, _ = load_members(parents)
    rows = held_out_rows(parents[0]).rows
    found = []
    for name in names:
        model.set_adapter(name)
        predicted = predict_rows(model, parents[0].renderer, rows, parents[0].labels, batch_size=32, adapter=True)
        found.append(predicted.probabilities)
    arms = run.read("scores.json")["domains"]["goods"]["arms"]
    for kind in ("mean_logits", "mean_probs", "vote"):
        chosen = together(np.stack(found), kind).argmax(axis=1)
        right = np.mean([parents[0].labels[label] == row.answer for label, row in zip(chosen, rows, strict=True)])
        assert arms[f"ensemble, {kind}"]["score"]["value"] == pytest.approx(right)


def test_what_was_made_before_is_taken_and_one_way_more_is_one_run_more(run: RunDir, root: Path) -> None:
    more = recipe(root.parent / "rows", 'merging.combine=[{"method": "linear"}, {"method": "svd", "rank": 4}]')
    again = train_merging(more, root=root, reporter=Silent())
    for name in ("goods", "weather", "together", "linear"):
        assert again.parts[name] == run.parts[name]
    assert "svd, rank 4" in again.parts and "svd, rank 4" not in run.parts
    before, after = (one.read("scores.json")["domains"] for one in (run, again))
    assert after["weather"]["arms"]["linear"] == before["weather"]["arms"]["linear"]
    assert "<html" in (again.path / "report.html").read_text("utf-8")


def test_a_run_whose_adapter_was_changed_is_not_taken(run: RunDir, root: Path, tmp_path: Path) -> None:
    own = parent_recipes(run.recipe())["goods"]
    part = prepare_parts({"goods": own}, Silent())["goods"]
    assert found_or_trained(part, root, told="goods", reporter=Silent()) == run.parts["goods"]
    copied = RunDir(shutil.copytree(run.parts["goods"].path, tmp_path / own.name / run.parts["goods"].path.name))
    assert found_or_trained(part, tmp_path, told="goods", reporter=Silent()) == copied
    (copied.adapter / "adapter_model.safetensors").write_bytes(b"")
    assert not copied.is_whole
    assert found_or_trained(part, tmp_path, told="goods", reporter=Silent()) != copied


def test_the_adapter_of_all_is_trained_on_the_rows_of_its_parents_and_no_others(run: RunDir) -> None:
    rows = {name: part.read("manifest.json")["rows"]["train"]["rows"] for name, part in run.parts.items()}
    assert rows["together"] == rows["goods"] + rows["weather"]
    limited = load_recipe("adapter-merging", ["merging.together=null"])
    parts = {name: own.data.max_train_rows for name, own in parent_recipes(limited).items()}
    assert parts == {"reviews": 1200, "topics": None}
    few = Data(
        sources=tuple(
            Source(
                train=str(one.data.train),
                test=str(one.data.test),
                columns=one.data.columns,
                labels=one.data.labels,
                max_train_rows=16 if number else None,
            )
            for number, one in enumerate(parent_recipes(limited).values())
        )
    )
    assert Counter(row.source for row in read_rows(few)[0])[1] == 16


def test_a_combination_is_a_run_and_the_comparison_is_none(run: RunDir) -> None:
    assert open_run(run.parts["linear"].path).kind == "adapter"
    with pytest.raises(RunError, match="several adapters compared"):
        open_run(run.path)


def test_what_cannot_be_merged_is_refused_before_anything_is_trained(root: Path, tmp_path: Path) -> None:
    for override, told in (
        ('merging.combine=[{"method": "ties", "weights": [1]}]', "a weight for each of 2 parents in ties, 1"),
        ('merging.combine=[{"method": "ties"}, {"method": "ties"}]', "ties once in combine"),
        ("merging.parents.weather.data.labels=[cold]", "different"),
        ('merging.parents={"goods": {}}', "at least two parents"),
        ("pipeline.document='{a}'", "pipeline"),
        ('merging.parents={"linear": {}, "base": {}}', "no parent that is called linear"),
        ('merging.parents={"one": {}, "two": {}}', "two with the same section data"),
        ('merging.combine=[{"method": "linear", "density": 0.5}]', "without density"),
        ('merging.combine=[{"method": "linear", "rank": 3}]', "without rank"),
        ("merging.together.training.learning_rat=1", "did you mean 'learning_rate'"),
        ("merging.together.data.labels=[a, b]", "no data in together"),
        ("merging.parents.weather.adapter.method=dora", "whose deltas add up"),
    ):
        with pytest.raises((RecipeError, Faults), match=told):
            recipe(tmp_path / "rows", override)
    rows = str(tmp_path / "rows" / "rows.jsonl")
    sources = f"merging.parents.goods.data.sources={json.dumps([{'train': rows}, {'train': rows}])}"
    with pytest.raises(RecipeError, match="2 sources"):
        recipe(tmp_path / "rows", sources)


def test_the_recipe_that_ships_trains_and_is_measured(tmp_path: Path) -> None:
    few = (*FEW, 'merging.combine=[{"method": "dare_ties"}]', "merging.together=null")
    own = ("merging.parents.reviews.data.max_train_rows=16", "merging.parents.topics.training.num_train_epochs=1")
    run = train_merging(load_recipe("adapter-merging", (*few, *own)), root=tmp_path, reporter=Silent())
    scores = run.read("scores.json")
    assert {name: own["rows"] for name, own in scores["domains"].items()} == {"reviews": 4, "topics": 4}
    assert set(run.parts) == {"reviews", "topics", "dare_ties"} and scores["mean"].keys() >= {"base", "dare_ties"}
