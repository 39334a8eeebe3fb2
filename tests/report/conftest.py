"""A run folder with an entry of every kind that a report shows, and markup in everything a user can write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ift_peft.recipe import Recipe, validate
from ift_peft.run_dir import RunDir, create_run
from ift_peft.yaml_source import read_yaml

PLACES = ("description", "label", "text", "instruction", "excerpt", "advice", "note", "source", "message", "training")
HIDDEN = "/home/somebody/private rows"


def planted(place: str) -> str:
    """Markup that would run if it were not escaped."""
    return f"<script>alert('{place}')</script>"


def part(value: float, *, spread: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    content = {
        "name": "planted",
        "description": planted("description"),
        "data": {
            "train": f"{HIDDEN}/train.jsonl",
            "test": f"{HIDDEN}/test.jsonl",
            "labels": [planted("label"), "negative"],
        },
        "training": {"seed": 7, "run_name": planted("training")},
    }
    path = tmp_path / "planted.yaml"
    path.write_text(json.dumps(content), "utf-8")
    return validate(read_yaml(path))


@pytest.fixture
def full_run(recipe: Recipe, tmp_path: Path) -> RunDir:
    """Every entry that a run may have, without training one."""
    run = create_run(recipe, tmp_path / "runs")
    label = planted("label")
    sides = {"base": {"accuracy": part(0.4)}, "adapter": {"accuracy": part(0.8)}, "change": {"accuracy": part(0.4)}}
    bins = [{"up_to": 1.0, "rows": 4, "confidence": 0.9, "accuracy": 0.5}]
    by_class = {name: {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2} for name in (label, "negative")}
    rates = {who: {"ece": part(value)} for who, value in (("base", 0.3), ("adapter", 0.1), ("change", -0.2))}
    scores = {
        "rows": 4,
        "intervals": "95 % intervals",
        **sides,
        "confusion": {"labels": [label, "negative"], "base": [[1, 1], [1, 1]], "adapter": [[2, 0], [0, 2]]},
        "per_class": {"base": by_class, "adapter": by_class},
        "calibration": {**rates, "bins": {"base": bins, "adapter": bins}},
        "unseen": {
            "rows": 4,
            **sides,
            "phrasings": [{"instruction": planted("instruction"), "base": 0.4, "adapter": 0.8}],
        },
        "by_source": {planted("source"): {"rows": 4, **sides}},
        "safety": {"refusals": {"base": part(0.1), "adapter": part(0.2), "change": part(0.1, spread=0.3)}},
        "gates": [
            {"name": "accuracy", "met": True, "expected": "accuracy at least 0.7", "found": "0.800"},
            {"name": "loss", "met": False, "expected": "loss at most 1", "found": "2.000"},
        ],
    }
    run.write("scores.json", scores)
    rows = [
        {"messages": [{"role": "user", "content": planted("message")}, {"role": "assistant", "content": label}]},
        {"messages": [], "text": planted("text")},
        {"messages": [], "text": "这家店的面很好吃"},
    ]
    run.write_lines("test.jsonl", rows)
    probabilities = [(0.1, 0.9), (0.8, 0.2), (0.5, 0.6)]
    lines = [
        {
            "row": at,
            "answer": label,
            **{who: {label: p, "negative": 1 - p} for who, p in zip(("base", "adapter"), pair, strict=True)},
        }
        for at, pair in enumerate(probabilities)
    ]
    run.write_lines("predictions.jsonl", lines)
    run.write_lines(
        "metrics.jsonl",
        [{"step": 10 * at, "loss": 100 / at, "learning_rate": 1e-3, "eval_accuracy": 0.1 * at} for at in range(1, 9)],
    )
    example = {"where": f"{HIDDEN}/train.jsonl:3", "excerpt": planted("excerpt"), "why": f"as {HIDDEN}/train.jsonl:1"}
    finding = {"kind": "exact_duplicates", "severity": "note", "rows": [2], "count": 1, "examples": [example]}
    run.write("findings.json", {"findings": [{**finding, "advice": planted("advice")}]})
    run.write_lines("dropped.jsonl", [{"where": "x:1", "kinds": ["exact_duplicates"], "text": "x"}])
    run.update_manifest(
        status="succeeded",
        notes=[planted("note"), f"read from {HIDDEN}/train.jsonl and /srv/models/base/config.json"],
        seconds=200.0,
        memory={"foreseen_bytes": 2_500_000_000, "foreseen": {"weights": 1}},
        steps=80,
        tokens_per_second=1000.0,
        padding_share=0.02,
        parameters={"trained": 10, "all": 1000},
        rows={"train": {"rows": 9, "variants": 1, "tokens": 90, "supervised_tokens": 9, "truncated": 1, "dropped": 0}},
        inputs={"train_sha256": "ab" * 32},
    )
    return run
