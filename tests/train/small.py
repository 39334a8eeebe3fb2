"""A recipe that trains in seconds: sixty short invented reviews over the built-in base."""

from __future__ import annotations

import json
from pathlib import Path

from ift_peft.recipe import Recipe, load_recipe

SMALL = """
name: small
base: {device: cpu}
adapter: {r: 4, lora_dropout: 0.1, embeddings: true}
data: {train: rows.jsonl, test: test.jsonl, instruction: 正面还是负面？, labels: [负面, 正面]}
training: {max_steps: 12, per_device_train_batch_size: 4, learning_rate: 2.0e-3, logging_steps: 1, seed: 0}
evaluation: {forgetting: false, bootstrap_samples: 100}
"""


def write_small(folder: Path) -> Path:
    """The recipe small.yaml in `folder`, with 60 training rows and 4 held-out ones beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    things = ["手机", "书", "鞋", "茶", "酒店", "电影", "耳机", "衣服", "蛋糕", "椅子"]
    words = {"正面": ["很好", "喜欢", "不错"], "负面": ["很差", "失望", "退货"]}
    rows = [{"text": f"{thing}{word}", "label": label} for label in words for word in words[label] for thing in things]
    for name, part in (
        ("rows.jsonl", rows),
        ("test.jsonl", [{**row, "text": f"这个{row['text']}"} for row in rows[::16]]),
    ):
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), "utf-8")
    (folder / "small.yaml").write_text(SMALL, "utf-8")
    return folder / "small.yaml"


def small(folder: Path, *overrides: str) -> Recipe:
    """The recipe of `write_small` with overrides."""
    return load_recipe(str(write_small(folder)), overrides)
