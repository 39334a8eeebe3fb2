"""Adapters combined into one: that its delta is what the method's name says, and that the run is one like any other."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ift_peft.adapters import weight_search
from ift_peft.adapters.combine import Asked, combine
from ift_peft.adapters.merge import merge
from ift_peft.adapters.weighted import Combination, add_combined
from ift_peft.errors import IftPeftError, RunError
from ift_peft.evaluate.arms import group
from ift_peft.evaluate.run import evaluate_run
from ift_peft.infer.load import held_out_rows, load_members, load_model, open_parts
from ift_peft.infer.predict import answer_all
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir, open_run
from ift_peft.stages import Method


class Net(nn.Module):
    """An embedding, a weight with a short side and a head, as PEFT sees them in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 12)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.down(torch.relu(self.up(self.embed(ids)))))
        return found


def net(*settings: dict[str, Any], head: bool = False) -> Any:
    """A PEFT model with adapters one and two of random weights for each of `settings`."""
    torch.manual_seed(0)
    plain: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["embed", "up", "down"]}
    plain |= {"modules_to_save": ["head"]} if head else {}
    configs = [LoraConfig(**plain | one) for one in settings]
    model = get_peft_model(Net(), configs[0], adapter_name="one")
    for name, config in zip(["two"], configs[1:], strict=True):
        model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_()
    return model


def deltas(model: Any, adapter: str) -> dict[str, Tensor]:
    return {
        name: layer.get_delta_weight(adapter).detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and (adapter in layer.lora_A or adapter in layer.lora_embedding_A)
    }


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-3) for name in one
    )


@pytest.mark.parametrize("method", ["linear", "svd"])
def test_a_sum_is_the_weighted_sum_of_deltas_whatever_the_ranks_scales_and_modules(method: Method) -> None:
    model = net({"use_rslora": True}, {"r": 2, "lora_alpha": 3, "target_modules": ["up", "embed"]})
    left_out = add_combined(model, ["one", "two"], Combination(method, (0.3, -1.2), rank=6), name="both")
    one, two = deltas(model, "one"), deltas(model, "two")
    wanted = {name: 0.3 * delta - 1.2 * two.get(name, torch.zeros_like(delta)) for name, delta in one.items()}
    assert close(deltas(model, "both"), wanted)
    assert left_out < 1e-6


def test_pefts_linear_is_another_thing() -> None:
    """Why `cat` is used: A and B summed apart give cross terms, and an adapter with itself twice its delta."""
    model = net({}, {})
    model.base_model.add_weighted_adapter(["one", "one"], [0.5, 0.5], "peft", combination_type="linear")
    add_combined(model, ["one", "one"], Combination("linear", (0.5, 0.5)), name="ours")
    assert close(deltas(model, "ours"), deltas(model, "one"))
    assert close(deltas(model, "peft"), {name: 2 * delta for name, delta in deltas(model, "one").items()})


FORMS: list[tuple[Method, str]] = [("linear", "cat"), ("ties", "ties_svd"), ("magnitude_prune", "magnitude_prune_svd")]


@pytest.mark.parametrize(("method", "form"), FORMS)
def test_methods_are_pefts_forms_on_deltas(method: Method, form: str) -> None:
    plain = {"target_modules": ["embed", "up"]}  # of `down`, PEFT's would have a rank that cannot be loaded again
    model = net(plain, plain)
    density = None if method == "linear" else 0.4
    add_combined(model, ["one", "two"], Combination(method, (0.7, 0.4), density, rank=8), name="ours")
    model.base_model.add_weighted_adapter(
        ["one", "two"],
        [0.7, 0.4],
        "peft",
        combination_type=form,
        svd_rank=8,
        svd_full_matrices=False,
        density=density,
    )
    assert close(deltas(model, "ours"), deltas(model, "peft"))


def test_the_share_left_out_by_the_rank_is_what_is_missing() -> None:
    model = net({}, {})
    whole = Combination("ties", (1.0, 1.0), 0.5, rank=20)
    assert add_combined(model, ["one", "two"], whole, name="whole") < 1e-6
    left_out = add_combined(model, ["one", "two"], Combination("ties", (1.0, 1.0), 0.5, rank=2), name="cut")
    wanted, found = deltas(model, "whole"), deltas(model, "cut")
    missing = sum(float((wanted[name] - found[name]).square().sum()) for name in wanted)
    assert left_out == pytest.approx(missing / sum(float(delta.square().sum()) for delta in wanted.values()), rel=1e-3)
    assert left_out > 0.1


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_is_drawn_by_its_seed_and_leaves_other_draws_alone(method: Method) -> None:
    model = net({}, {})
    for name, seed in (("first", 3), ("again", 3), ("next", 4)):
        torch.rand(7)  # what else is drawn does not matter
        add_combined(model, ["one", "two"], Combination(method, (0.5, 0.5), 0.5, rank=20, seed=seed), name=name)
    assert close(deltas(model, "first"), deltas(model, "again"))
    assert not close(deltas(model, "first"), deltas(model, "next"))


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_at_density_one_nothing_is_pruned(method: Method) -> None:
    model = net({}, {})
    weights = (1.0, 1.0) if "ties" in method else (0.5, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_combined(model, ["one", "one"], Combination(method, weights, 1.0, rank=20), name="same")
    assert close(deltas(model, "same"), deltas(model, "one"))


def test_a_head_trained_whole_is_combined_by_its_difference_from_the_base() -> None:
    model = net({}, {}, head=True)
    add_combined(model, ["one", "two"], Combination("linear", (0.5, 2.0)), name="both")
    head = model.base_model.model.head
    base, one, two, both = (
        module.weight
        for module in (head.original_module, *(head.modules_to_save[name] for name in ("one", "two", "both")))
    )
    assert torch.allclose(both, base + 0.5 * (one - base) + 2 * (two - base), atol=1e-5)


def test_what_is_saved_is_what_was_combined(tmp_path: Path) -> None:
    """Also of a weight whose short side is less than the rank."""
    model = net({}, {}, head=True)
    add_combined(model, ["one", "two"], Combination("ties", (1.0, 1.0), 0.5), name="both")
    model.set_adapter("both")
    ids = torch.arange(6)[None]
    expected = model(ids)
    model.save_pretrained(tmp_path, selected_adapters=["both"], save_embedding_layers=False)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path / "both")
    assert torch.allclose(again(ids), expected, atol=1e-3, rtol=1e-4)


def combined(runs: list[RunDir], root: Path, **asked: Any) -> RunDir:
    name = asked.pop("name", "both")
    return combine(runs, Asked(**{"method": "linear", **asked}), name=name, root=root, reporter=Silent())


def lines(run: RunDir, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / name).read_text("utf-8").splitlines()]


@pytest.fixture(scope="session")
def alone(one: RunDir, two: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """All of the first, nothing of the second."""
    return combined([one, two], tmp_path_factory.mktemp("alone"), weights=(1.0, 0.0))


@pytest.fixture(scope="session")
def mixed(one: RunDir, other: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return combined([one, other], tmp_path_factory.mktemp("mixed"), method="dare_ties", seed=5)


@pytest.mark.slow
def test_all_of_the_first_is_the_first(one: RunDir, alone: RunDir) -> None:
    found, expected = lines(alone, "predictions.jsonl"), lines(one, "predictions.jsonl")
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["adapter"] == pytest.approx(theirs["adapter"], abs=1e-5)
    assert alone.read("scores.json")["adapter"] == one.read("scores.json")["adapter"]
    ids = torch.tensor([one.read("golden.json")["input_ids"]])
    with torch.no_grad():
        logits = [load_model(open_parts(run))[0](input_ids=ids).logits for run in (alone, one)]
    assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.slow
def test_the_result_is_a_run_like_any_other(one: RunDir, alone: RunDir, tmp_path: Path) -> None:
    assert open_run(alone.path).recipe().data == one.recipe().data
    assert evaluate_run(alone, data=None, reporter=Silent()) == alone.read("scores.json")
    parts = open_parts(alone)
    result = merge(parts, output=tmp_path / "merged", dtype="float32", reporter=Silent())
    assert result.max_logit_difference < 1e-3 and result.same_labels == result.rows
    manifest = alone.read("manifest.json")
    assert [parent["run"].split("/")[0] for parent in manifest["combined_from"]] == ["small", "small"]
    assert manifest["combined"]["weights"] == [1.0, 0.0]
    assert "combined by linear" in (alone.adapter / "README.md").read_text("utf-8")
    report = (alone.path / "report.html").read_text("utf-8")
    assert "ift combine runs/small/" in report and "recipe.yaml" not in report.split("How to", 1)[-1].split("<h2")[0]
    (arm_one, arm_two), notes = group([one, alone])
    assert arm_one.name != arm_two.name and not notes


@pytest.mark.slow
def test_two_tasks_become_a_mix_named_after_their_runs(one: RunDir, other: RunDir, mixed: RunDir) -> None:
    scores, recipe = mixed.read("scores.json"), mixed.recipe()
    assert recipe.data.source_names == ("small", "other")
    assert {name: own["rows"] for name, own in scores["by_source"].items()} == {
        "small": one.read("scores.json")["rows"],
        "other": other.read("scores.json")["rows"],
    }
    for name, run in (("small", one), ("other", other)):
        assert scores["by_source"][name]["base"] == run.read("scores.json")["base"]
    parts = open_parts(mixed).as_source("other")
    model, _ = load_model(parts)
    line = next(line for line in lines(mixed, "predictions.jsonl") if line["source"] == "other")
    row = held_out_rows(parts).rows[line["row"]]
    (answer,) = answer_all(model, parts, [parts.ask(row.text or "")], max_new_tokens=2)
    assert answer.probabilities == pytest.approx(line["adapter"], abs=1e-4)


@pytest.mark.slow
def test_dare_gives_the_same_file_again(one: RunDir, other: RunDir, mixed: RunDir, tmp_path: Path) -> None:
    again = combined([one, other], tmp_path, method="dare_ties", seed=5)
    weights = [(run.adapter / "adapter_model.safetensors").read_bytes() for run in (mixed, again)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_other_bases_and_forms_are_refused_with_the_difference(
    one: RunDir, two: RunDir, elsewhere: RunDir, tmp_path: Path
) -> None:
    bases = [run.read("manifest.json")["inputs"]["base_fingerprint"][:12] for run in (one, elsewhere)]
    with pytest.raises(RunError, match=rf"tiny \({bases[0]}\)[\s\S]*base \({bases[1]}\)"):
        combined([one, elsewhere], tmp_path)
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(two.path, copy.path)
    config = json.loads((copy.adapter / "adapter_config.json").read_text("utf-8"))
    (copy.adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}), "utf-8")
    copy.update_manifest(adapter_sha256=copy.adapter_hashes())
    with pytest.raises(RunError, match=r"plain LoRA[\s\S]*use_dora True"):
        combined([one, copy], tmp_path)
    for asked, message in (
        ({"weights": (1.0,)}, "a weight for each of 2"),
        ({"density": 0.5}, "--density with ties"),
        ({"rank": 4}, "no --rank with linear"),
        ({"method": "ties", "density": 1.5}, "above 0, up to 1"),
    ):
        with pytest.raises(IftPeftError, match=message):
            combined([one, two], tmp_path, **asked)
    assert not (tmp_path / "both").exists()


@pytest.mark.slow
def test_held_out_rows_that_another_run_learnt_are_left_out(one: RunDir, tmp_path: Path) -> None:
    """A run that was trained on all rows of the first, its held-out ones among them."""
    copy = RunDir(tmp_path / "runs" / "learnt" / "1")
    shutil.copytree(one.path, copy.path)
    text = (copy.path / "recipe.yaml").read_text("utf-8")
    (copy.path / "recipe.yaml").write_text(
        text.replace("name: small", "name: learnt").replace("正面还是负面？", "好吗？"), "utf-8"
    )
    golden = copy.read("golden.json")
    trained = [*lines(one, "test.jsonl")[:1], {"messages": golden["messages"], "where": "x", "text": "其他"}]
    copy.write_lines("train.jsonl", trained)
    copy.write_lines("test.jsonl", [{**lines(one, "test.jsonl")[1], "text": "另一个"}])
    run = combined([one, copy], tmp_path / "out")
    assert run.read("scores.json")["by_source"]["small"]["rows"] == len(lines(one, "test.jsonl")) - 1
    assert any("1 held-out rows of small" in note for note in run.read("manifest.json")["notes"])


@pytest.mark.slow
def test_a_search_reads_no_held_out_row_and_takes_the_best(
    one: RunDir, two: RunDir, other: RunDir, tmp_path: Path
) -> None:
    copies = []
    for run in (one, other):
        copy = RunDir(tmp_path / "runs" / run.path.parent.name / run.path.name)
        shutil.copytree(run.path, copy.path)
        copy.test_rows.write_text("not a row\n", "utf-8")
        copies.append(open_parts(copy))
    found = weight_search.search_rows(copies, seed=0)
    held_out = {row["text"] for run in (one, other) for row in lines(run, "test.jsonl")}
    assert found.kind == weight_search.TRAINED_ON and not held_out & {row.text for row in found.rows}
    assert {row.source for row in found.rows} == {0, 1}
    run = combined([one, two], tmp_path / "out", trials=4)
    tried = run.read("search.json")["tried"]
    losses = [one["loss"] for one in tried]
    assert losses == sorted(losses) and len({tuple(one["weights"]) for one in tried}) > 2
    assert run.read("manifest.json")["combined"]["weights"] == tried[0]["weights"]
    assert run.read("search.json")["trained_on"]
    parents = [open_parts(parent) for parent in (one, two)]
    model, names, _ = load_members(parents)
    add_combined(model, names, Combination("linear", tuple(tried[0]["weights"])), name="best")
    rows = weight_search.search_rows(parents, seed=0).rows
    answers = answer_all(model, parents[0], [parents[0].ask(row.text or "") for row in rows], max_new_tokens=1)
    missed = [-math.log((answer.probabilities or {})[row.answer]) for answer, row in zip(answers, rows, strict=True)]
    assert tried[0]["loss"] == pytest.approx(sum(missed) / len(missed), abs=1e-4)
