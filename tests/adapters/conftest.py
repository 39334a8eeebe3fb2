"""Small runs over the built-in base: two seeds of one task, another task, and one over another base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ift_peft.model.tokenizer import TINY
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.train.run import train
from tests.train.small import small

SHORT = ("training.max_steps=6", "base.device=cpu")


@pytest.fixture(scope="session")
def runs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("combined") / "runs"


def trained(root: Path, *overrides: str) -> RunDir:
    return train(small(root.parent / "data", *SHORT, *overrides), root=root, reporter=Silent())


@pytest.fixture(scope="session")
def one(runs_root: Path) -> RunDir:
    return trained(runs_root)


@pytest.fixture(scope="session")
def two(runs_root: Path) -> RunDir:
    """Another seed of the same task, at another rank, with rsLoRA."""
    return trained(runs_root, "training.seed=1", "adapter.r=6", "adapter.use_rslora=true")


@pytest.fixture(scope="session")
def other(runs_root: Path) -> RunDir:
    """Another task, with rows of its own, that are split."""
    rows = [{"text": f"{word} {number}", "label": label} for label, word in LABELLED for number in range(12)]
    path = runs_root.parent / "more.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    overrides = ("name=other", f"data.train={path}", "data.test=null", "data.labels=[cold, warm]")
    return trained(runs_root, *overrides, "data.instruction=Cold or warm?")


LABELLED = (("cold", "snow and ice"), ("warm", "sun and sand"))


@pytest.fixture(scope="session")
def elsewhere(runs_root: Path) -> RunDir:
    """The task of `one` over a base with one weight changed."""
    base = runs_root.parent / "base"
    shutil.copytree(TINY, base)
    (weights,) = base.glob("*.safetensors")
    content = load_file(weights)
    content["model.norm.weight"] = content["model.norm.weight"] * 1.01
    save_file(content, weights, metadata={"format": "pt"})
    return trained(runs_root, f"base.model={base}")


@pytest.fixture(scope="session")
def classifier(runs_root: Path) -> RunDir:
    """The task of `one` by a classifier's head."""
    head = ("base.head=sequence-classification", "data.instruction=null", "data.labels=[正面, 负面]")
    return trained(runs_root, "name=classifier", *head)
