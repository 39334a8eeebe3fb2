"""Every method of adapting over every quantisation, by what writes docs/methods.md's table; what else runs do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benchmarks.adapter_methods import (
    QUANTIZATIONS,
    Case,
    documented,
    measured,
    recipe_of,
    refusal,
    table,
    write_rows,
)
from benchmarks.record import RESULTS
from ift_peft.adapter_methods import Method
from ift_peft.adapters.combine import Asked, combine
from ift_peft.adapters.merge import merge
from ift_peft.cli.app import app
from ift_peft.errors import Faults, IftPeftError, MergeError, RunError
from ift_peft.infer.ensemble import answer_together, open_members
from ift_peft.infer.load import held_out_rows, open_parts
from ift_peft.infer.predict import answer_all
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir, open_run
from ift_peft.train.run import resume, train
from tests.e2e.small_base import make_base

pytestmark = pytest.mark.slow
METHODS = get_args(Method)
CaseOf = Callable[[str, str], tuple[Case, RunDir]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("methods")
    write_rows(found)
    make_base(found / "base")
    return found


@pytest.fixture(scope="module")
def case_of(folder: Path) -> CaseOf:
    """Each case is measured once, and its run kept."""
    cases: dict[tuple[str, str], Case] = {}

    def find(method: str, quantization: str) -> tuple[Case, RunDir]:
        key = (method, quantization)
        if key not in cases:
            cases[key] = measured(folder, method, quantization, f"base.model={folder / 'base'}")
        return cases[key], open_run(folder / f"{method}-{quantization}" / "methods" / "latest")

    return find


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_and_merged_is_what_was_trained(
    folder: Path, case_of: CaseOf, method: str, quantization: str
) -> None:
    reason = refusal(folder, method, quantization)
    if reason is not None:
        with pytest.raises(IftPeftError, match=re.escape(reason)):
            measured(folder, method, quantization)
        return
    case, run = case_of(method, quantization)
    assert not case.faults, case
    assert run.read("manifest.json")["memory"]["foreseen"]["adapter"] >= 16 * case.trained


def test_the_documented_table_is_what_was_measured_and_what_the_code_refuses(folder: Path) -> None:
    result = json.loads((RESULTS / "adapter_methods_builtin.json").read_text("utf-8"))["result"]
    cases = [Case(**one) for one in result["cases"]]
    assert documented() == table(cases, folder)
    assert not [case for case in cases if case.faults]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in documented()[2:]]
    told = {cells[0]: cells[4:7] for cells in rows}
    assert tuple(told) == METHODS
    for method, cells in told.items():
        for quantization, cell in zip(QUANTIZATIONS, cells, strict=True):
            assert (cell == "refused") == (refusal(folder, method, quantization) is not None), (method, quantization)


def quantized(method: str) -> str:
    return "nf4" if method == "loftq" else "none"


@pytest.mark.parametrize("method", METHODS)
def test_a_run_answers_as_it_was_measured_also_beside_another_kind_of_adapter(case_of: CaseOf, method: str) -> None:
    parts = [open_parts(case_of(one, quantized(method))[1]) for one in (method, "lora")]
    texts = [row.messages[-2]["content"] for row in held_out_rows(parts[0]).rows]
    members, _ = open_members(parts)
    questions = [[one.converse([{"role": "user", "content": text}]) for text in texts] for one in parts]
    alone = [
        [answer.probabilities for answer in answer_all(member.activate(), one, asked, max_new_tokens=1)]
        for member, one, asked in zip(members, parts, questions, strict=True)
    ]
    for found, line in zip(alone[0], parts[0].run.read_lines("predictions.jsonl"), strict=True):
        assert found == pytest.approx(line["adapter"], abs=1e-5)
    together = answer_together(members, questions, labels=("cold", "warm"), kind="mean_probs")
    for answer, one, other in zip(together, *alone, strict=True):
        assert answer.probabilities["cold"] == pytest.approx((one["cold"] + other["cold"]) / 2, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_explained_by_the_weights_that_were_trained(case_of: CaseOf, tmp_path: Path, method: str) -> None:
    case, run = case_of(method, quantized(method))
    written = tmp_path / "explained.json"
    arguments = ["explain", str(run.path), "--text", "a snow 1", "--rows", "1", "--sample", "4", "--json", str(written)]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert f"over {case.trained:,} adapter weights" in " ".join(told.output.split())
    assert any(piece["adapter"] for piece in json.loads(written.read_text("utf-8"))["explanations"][0]["pieces"])


@pytest.mark.parametrize("method", METHODS)
def test_only_what_adds_up_is_combined_and_comes_out_as_plain_lora(
    case_of: CaseOf, tmp_path: Path, method: str
) -> None:
    first = case_of("lora", quantized(method))[1]
    run = case_of(method, quantized(method))[1]
    if method in ("dora", "loftq", "vera", "ia3", "adalora"):
        with pytest.raises((RunError, Faults), match="plain LoRA, whose deltas add up"):
            combine([first, run], Asked("linear"), name=None, root=tmp_path, reporter=Silent())
        return
    combined = combine([run, first], Asked("linear"), name=None, root=tmp_path, reporter=Silent())
    adapter = combined.recipe().adapter
    assert (adapter.method, adapter.rank_pattern, adapter.use_rslora) == ("lora", {}, False)
    assert "A LoRA adapter" in (combined.adapter / "README.md").read_text("utf-8")


@pytest.mark.parametrize("method", ["vera", "ia3", "adalora"])
def test_a_tensor_that_an_adapter_lacks_is_told_before_it_is_merged(
    case_of: CaseOf, tmp_path: Path, method: str
) -> None:
    run = RunDir(shutil.copytree(case_of(method, "none")[1].path, tmp_path / "run"))
    file = run.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[-1]
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    run.update_manifest(adapter_sha256=run.adapter_hashes())
    with pytest.raises(MergeError, match=re.escape(lost)):
        merge(open_parts(run), output=tmp_path / "merged", dtype="float32", reporter=Silent())


@pytest.mark.parametrize("method", ["pissa", "eva", "loftq", "adalora"])
def test_a_resumed_run_ends_in_the_weights_of_an_uninterrupted_one(folder: Path, tmp_path: Path, method: str) -> None:
    own = (f"base.model={folder / 'base'}", "training.max_steps=4", "training.save_strategy=steps")
    recipe = recipe_of(folder, method, "nf4", *own, "training.save_steps=2", "training.save_total_limit=2")
    whole = train(recipe, root=tmp_path, reporter=Silent())
    cut = RunDir(shutil.copytree(whole.path, tmp_path / "cut"))
    shutil.rmtree(cut.adapter)
    shutil.rmtree(cut.checkpoints / "checkpoint-4")
    cut.update_manifest(status="interrupted")
    resume(cut, reporter=Silent())
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (cut, whole))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
