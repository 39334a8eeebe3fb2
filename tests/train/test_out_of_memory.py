"""Micro-batches that were cut: to the same bits wherever memory ran out and whatever was interrupted, and told."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir, open_run
from ift_peft.train.out_of_memory import has_dropout
from ift_peft.train.run import resume, train
from ift_peft.train.session import Interrupted
from tests.e2e.small_base import make_base
from tests.train.scarce import OutOfRows, Telling
from tests.train.small import small
from tests.train.test_checkpoints import At, interrupt, logged

pytestmark = pytest.mark.slow
SETTINGS = (  # of dropout the recipe has a tenth
    *("training.max_steps=6", "training.gradient_accumulation_steps=2", "training.logging_steps=1"),
    *("training.save_strategy=steps", "training.save_steps=2"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


def run_of(folder: Path, base: Path, *callbacks: Any, reporter: Silent | None = None) -> RunDir:
    recipe = small(folder, *SETTINGS, f"base.model={base}")
    return train(recipe, root=folder, reporter=reporter or Silent(), callbacks=callbacks)


def interrupted(folder: Path, base: Path, *callbacks: Any) -> RunDir:
    with pytest.raises(Interrupted):
        run_of(folder, base, *callbacks)
    return open_run(folder / "small", finished=False)


def learnt(run: RunDir) -> tuple[Any, ...]:
    """What two runs have to have in common that learnt the same: lines of the log, rows, bits of the adapter."""
    manifest = run.read("manifest.json")
    return logged(run), manifest["order_sha256"], manifest["adapter_sha256"]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """With memory for all rows."""
    return run_of(tmp_path_factory.mktemp("whole"), base)


@pytest.fixture(scope="module")
def told() -> Telling:
    return Telling()


@pytest.fixture(scope="module")
def cut(base: Path, tmp_path_factory: pytest.TempPathFactory, told: Telling) -> RunDir:
    """With memory for one row of four, from step 4 on."""
    return run_of(tmp_path_factory.mktemp("cut"), base, OutOfRows(1, since=3), reporter=told)


def test_wherever_memory_runs_out_nothing_is_left_of_the_attempt(base: Path, cut: RunDir, tmp_path: Path) -> None:
    scarce = OutOfRows(1, since=3, at="backward")
    assert learnt(run_of(tmp_path, base, scarce)) == learnt(cut)
    assert scarce.refused == 2


def test_a_run_that_was_cut_goes_on_in_parts_to_the_same_bits(base: Path, cut: RunDir, tmp_path: Path) -> None:
    run = interrupted(tmp_path, base, OutOfRows(1, since=3), At(5, interrupt))
    rows, told = OutOfRows(), Telling()  # from here on there is memory for all
    resume(run, reporter=told, callbacks=[rows])
    assert run.read("manifest.json")["resumed"][0]["from"] == "checkpoint-4"
    assert rows.tried == {1}
    assert "1 row at a time: memory ran out at step 4" in told.notes
    assert learnt(run) == learnt(cut)
    assert run.read("manifest.json")["micro_batch"] == cut.read("manifest.json")["micro_batch"]


def test_of_a_cut_after_the_checkpoint_nothing_stays(base: Path, whole: RunDir, tmp_path: Path) -> None:
    run = interrupted(tmp_path, base, OutOfRows(1, since=4), At(5, interrupt))
    assert run.read("manifest.json")["micro_batch"]["since_step"] == 5
    rows = OutOfRows()
    resume(run, reporter=Silent(), callbacks=[rows])
    assert rows.tried == {4}
    assert learnt(run) == learnt(whole)
    assert not run.read("manifest.json")["micro_batch"]


def test_a_run_made_of_a_training_that_has_ended_tells_of_its_cut(cut: RunDir, tmp_path: Path) -> None:
    """As the best trial of a search becomes one."""
    run = RunDir(shutil.copytree(cut.path, tmp_path / "run", symlinks=True))
    run.update_manifest(status="interrupted", micro_batch=None, training_ended=True)
    resume(run, reporter=Silent())
    assert run.read("manifest.json")["micro_batch"] == cut.read("manifest.json")["micro_batch"]
    assert learnt(run) == learnt(cut)


def test_that_dropout_draws_other_masks_for_parts_is_told_and_recorded(
    whole: RunDir, cut: RunDir, told: Telling
) -> None:
    ours, theirs = learnt(cut), learnt(whole)
    assert ours[1] == theirs[1]  # the same rows
    assert ours[0][:3] == theirs[0][:3]
    assert abs(ours[0][3]["loss"] / theirs[0][3]["loss"] - 1) > 1e-4  # more than the order of a sum makes
    warnings = [note for note in told.notes if "out of memory" in note]
    assert len(warnings) == 2
    assert all("(dropout) is not what whole batches would have had" in note for note in warnings)
    assert cut.read("manifest.json")["micro_batch"] == {
        "rows_at_once": 1,
        "since_step": 4,
        "drawn_otherwise": ["dropout"],
    }


@pytest.mark.parametrize("attention", [0.0, 0.1])
@pytest.mark.parametrize("module", [0.0, 0.1])
def test_dropout_is_seen_in_modules_and_in_the_settings_of_a_base(attention: float, module: float) -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        attention_dropout=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.add_module("dropout", torch.nn.Dropout(module))
    assert has_dropout(model) == (attention > 0 or module > 0)
