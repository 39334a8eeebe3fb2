"""A run on made-up rows of which it is known what decides them: one word each, anywhere among others."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ift_peft.infer.load import Parts, load_model, open_parts
from ift_peft.recipe import load_recipe
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.train.run import train

WORDS = (
    *("table", "door", "window", "street", "paper", "morning", "kitchen"),
    *("garden", "number", "letter", "winter", "bottle", "picture", "train"),
)
CUES = {"正面": ("great", "lovely", "perfect"), "负面": ("awful", "dirty", "broken")}
QUERY = "letter window great garden paper winter"


def cued_rows(count: int, *, seed: int) -> list[dict[str, str]]:
    """Texts of seven words, one of which is a cue of the label."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        label = ("正面", "负面")[number % 2]
        words = rng.sample(WORDS, 6)
        words.insert(rng.randrange(7), rng.choice(CUES[label]))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


@pytest.fixture(scope="session")
def cued_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Trained on 320 such rows, the query among them with its label (line 7) and with the other one (line 12)."""
    folder = tmp_path_factory.mktemp("cued")
    rows = cued_rows(318, seed=0)
    rows.insert(6, {"text": QUERY, "label": "正面"})
    rows.insert(11, {"text": QUERY, "label": "负面"})
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", cued_rows(40, seed=1))
    overrides = (
        f"data.train={folder / 'train.jsonl'}",
        f"data.test={folder / 'test.jsonl'}",
        "base.device=cpu",
        "training.num_train_epochs=3",
        "training.warmup_steps=5",
        "training.learning_rate=2e-3",
        "evaluation.forgetting=false",
        "evaluation.unseen_instructions=null",
        "evaluation.max_unseen_rows=null",
        "evaluation.perturbation=null",
    )
    return train(load_recipe("sentiment", overrides), root=folder / "runs", reporter=Silent())


@pytest.fixture(scope="session")
def parts(cued_run: RunDir) -> Parts:
    return open_parts(cued_run)


@pytest.fixture(scope="session")
def model(parts: Parts) -> Any:
    return load_model(parts)[0]
