from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ift_peft.data.quality import find
from ift_peft.data.row import Row
from ift_peft.data.rows import read_rows
from ift_peft.sections import Data, Quality


def mixed(tmp_path: Path, **settings: Any) -> Data:
    """Two sources with classes of their own, stored as numbers and as other words, and one of free answers."""
    stored: dict[str, list[dict[str, Any]]] = {
        "reviews": [{"text": f"好{n}", "label": n % 2} for n in range(4)],
        "films": [{"text": f"fine {n}", "label": ("neg", "pos")[n % 2]} for n in range(4)],
        "sums": [{"text": f"1+{n}", "answer": str(1 + n)} for n in range(4)],
    }
    for name, rows in stored.items():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    own: dict[str, dict[str, Any]] = {
        "reviews": {"labels": ["负面", "正面"], "instruction": "从{labels}中选一个。"},
        "films": {"labels": {"neg": "negative", "pos": "positive"}, "instruction": "One of {labels}?"},
        "sums": {"metrics": ["exact_match"]},
    }
    sources = [{"train": str(tmp_path / name / "train.jsonl"), **of} for name, of in own.items()]
    return Data.model_validate({"sources": sources, "test_size": 3, **settings})


def test_each_source_reads_and_asks_by_its_own_labels(tmp_path: Path) -> None:
    data = mixed(tmp_path)
    assert data.mixed and data.label_words == ()
    assert data.source_names == ("reviews", "films", "sums")
    assert data.classes == {"reviews": ("负面", "正面"), "films": ("negative", "positive"), "sums": ()}
    train, test = read_rows(data)
    rows = sorted([*train, *test], key=lambda row: (row.source, row.where))
    assert [row.label for row in rows] == ["负面", "正面"] * 2 + ["negative", "positive"] * 2 + [None] * 4
    assert [row.answer for row in rows[8:]] == ["1", "2", "3", "4"]
    assert rows[0].prompt[-1]["content"] == "从负面、正面中选一个。\n好0"
    assert rows[4].prompt[-1]["content"] == "One of negative, positive?\nfine 0"


def test_sources_that_are_called_alike_are_refused_and_a_name_sets_them_apart() -> None:
    sources = [{"train": "a/train.jsonl", "labels": ["x", "y"]}, {"train": "b/a/train.jsonl"}]
    with pytest.raises(ValueError, match="2 are called 'a'"):
        Data.model_validate({"sources": sources})
    sources[1]["name"] = "b"
    assert Data.model_validate({"sources": sources}).source_names == ("a", "b")


@pytest.mark.parametrize(
    ("train", "name"),
    [("data/films/train.jsonl", "films"), ("data/films", "films"), ("owner/set", "set"), ("rows.csv", "rows")],
)
def test_a_source_without_a_name_is_called_as_its_folder(train: str, name: str) -> None:
    assert Data.model_validate({"sources": [{"train": train}]}).source_names == (name,)


def test_sources_that_differ_in_no_task_are_one_task_as_before() -> None:
    plain = Data.model_validate({"sources": [{"train": "a.jsonl"}, {"train": "b.jsonl", "weight": 2}]})
    labelled = Data.model_validate(
        {"sources": [{"train": "a.jsonl", "labels": ["y", "x"]}, {"train": "b.jsonl"}], "labels": ["x", "y"]}
    )
    assert not plain.mixed and not labelled.mixed
    assert (plain.classes, labelled.classes) == ((), ("x", "y"))


@pytest.mark.parametrize(
    ("of", "settings", "message"),
    [
        ({"labels": ["x", "y"], "metrics": ["f1"]}, {}, "metrics only in sources without labels"),
        ({"metrics": ["f1"]}, {"labels": ["x", "y"]}, "metrics only in sources without labels"),
        ({"labels": ["x", "y"]}, {"test": "test.jsonl"}, "test in each source in place of data.test"),
        ({"labels": ["x", "y"]}, {"labels": ["x", "z"]}, "the same classes in every source"),
        ({"metrics": ["f1"]}, {"augment": {"synonyms": 0.1}}, "augment only with labels"),
    ],
)
def test_what_does_not_fit_a_mix_is_refused(of: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Data.model_validate({"sources": [{"train": "a.jsonl", **of}], **settings})


def test_texts_are_augmented_where_every_source_has_labels_of_its_own() -> None:
    sources = [{"train": "a/x.jsonl", "labels": ["x", "y"]}, {"train": "b/x.jsonl", "labels": ["v", "w"]}]
    data = Data.model_validate({"sources": sources, "augment": {"synonyms": 0.1}})
    assert data.protected_words == {"x", "y", "v", "w"}


def row(source: int, number: int, label: str) -> Row:
    text = f"{label} {number}"
    messages = ({"role": "user", "content": text}, {"role": "assistant", "content": label})
    return Row(messages, f"{source}:{number}", label, text, source)


def test_classes_are_checked_in_each_source_by_itself() -> None:
    many = [row(0, number, "ab"[number % 2]) for number in range(60)]
    few = [row(1, number, "cd"[number == 3]) for number in range(4)]
    off = dict.fromkeys(("exact_duplicates", "near_duplicates", "mislabelled", "contradictions"), "off")
    section = Quality.model_validate({**off, "imbalance_ratio": 3})
    classes = {"many": ("a", "b"), "few": ("c", "d", "e"), "free": ()}
    missing, rare = find([*many, *few], (), section, labels=classes, lengths=None, max_length=None)
    assert (missing.severity, missing.count) == ("error", 1)
    assert missing.advice.startswith("in few: no row of e")
    assert rare.rows == (63,)
    assert rare.examples[0].where == "1:3"
