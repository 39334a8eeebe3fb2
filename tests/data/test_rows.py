from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ift_peft.data.row import Row
from ift_peft.data.rows import read_rows, read_rows_of, split_rows
from ift_peft.errors import DataError, Faults
from ift_peft.sections import Columns, Data


def rows_of(tmp_path: Path, records: list[dict[str, Any]], **options: Any) -> list[Row]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return read_rows_of(Data(train=str(path), **options))


def turns(row: Row) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in row.messages]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "q\nx"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q\nx"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q\nx", "completion": "a"},
        {"instruction": "q", "input": "x", "output": "a"},
        {"text": "q\nx", "answer": "a"},
    ],
)
def test_all_formats_are_recognised_and_mean_the_same(tmp_path: Path, record: dict[str, Any]) -> None:
    (row,) = rows_of(tmp_path, [record])
    assert turns(row) == [("user", "q\nx"), ("assistant", "a")]
    assert row.where.endswith("rows.jsonl:1")


def test_instruction_and_system_are_put_around_the_text(tmp_path: Path) -> None:
    record = {"text": "好", "label": "1"}
    options = {"labels": ["负面", "正面"], "system": "s"}
    (row,) = rows_of(tmp_path, [record], instruction="分类。", **options)
    assert turns(row) == [("system", "s"), ("user", "分类。\n好"), ("assistant", "正面")]
    (row,) = rows_of(tmp_path, [record], instruction="文本：{text}。分类。", **options)
    assert turns(row)[1] == ("user", "文本：好。分类。")


def test_labels_are_words_numbers_or_mapped_values(tmp_path: Path) -> None:
    stored = [{"text": "x", "label": label} for label in ("正面", 0, "1", " 负面 ")]
    assert [row.label for row in rows_of(tmp_path, stored, labels=["负面", "正面"])] == ["正面", "负面", "正面", "负面"]
    mapped = rows_of(tmp_path, [{"text": "x", "label": "pos"}], labels={"pos": "正面", "neg": "负面"})
    assert mapped[0].answer == "正面"
    stars = rows_of(tmp_path, [{"text": "x", "label": 1}], labels=["0", "1", "2"])
    assert stars[0].label == "1"


def test_every_unusable_row_is_named_at_once(tmp_path: Path) -> None:
    records = [
        {"text": "fine", "label": "a"},
        {"text": "", "label": "a"},
        {"text": "x", "label": "c"},
        {"label": "a"},
        {"text": 3, "label": "a"},
    ]
    with pytest.raises(Faults) as caught:
        rows_of(tmp_path, records, labels=["a", "b"], columns=Columns(label="label"))
    assert [str(fault).split("rows.jsonl:")[1][0] for fault in caught.value.faults] == ["2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "user", "content": "q"}]}, "to end with the assistant"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "a user message"),
        ({"messages": [{"role": "usr", "content": "q"}, {"role": "assistant", "content": "a"}]}, "roles out of"),
        ({"prompt": "q", "completion": "  "}, "an empty answer"),
        ({"prompt": "q", "completion": None}, "nothing"),
        ({"txt": "q", "lab": "a"}, "columns txt, lab"),
    ],
)
def test_rows_that_teach_nothing_are_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path, [record])


def test_more_faults_than_a_screen_are_counted(tmp_path: Path) -> None:
    with pytest.raises(Faults, match="30 more faults"):
        rows_of(tmp_path, [{"prompt": "q", "completion": ""}] * 50)


def test_rows_cannot_be_trained_on_and_held_out_at_once(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "q", "completion": "a"}) + "\n"
    (tmp_path / "reviews.jsonl").write_text(line, "utf-8")
    (tmp_path / "test.jsonl").write_text(line, "utf-8")
    with pytest.raises(DataError, match=r"1 rows in both, the first at .*test\.jsonl:1"):
        read_rows(Data(train=str(tmp_path)))
    with pytest.raises(DataError, match="different files"):
        read_rows(Data(train=str(tmp_path / "test.jsonl"), test=str(tmp_path / "test.jsonl")))


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            {"instruction": "x"},
            "no data.instruction",
        ),
        ({"instruction": "q", "output": "a", "history": [["b"]]}, {}, "history to be a list"),
        ({"instruction": "q", "input": [1], "output": "a"}, {}, "text under 'input'"),
        ({"prompt": "hi \ud83d", "completion": "a"}, {}, "half of a surrogate pair"),
    ],
)
def test_what_would_be_ignored_is_refused(
    tmp_path: Path, record: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n", "utf-8")
    with pytest.raises(DataError, match=message):
        read_rows_of(Data(train=str(path), **options))


def row(text: str, label: str, number: int) -> Row:
    return Row(({"role": "user", "content": text}, {"role": "assistant", "content": label}), f"f:{number}", label, text)


def test_a_split_is_reproducible_stratified_and_keeps_equal_texts_together() -> None:
    rows = [row(f"text {i // 2}", "ab"[i // 2 % 4 == 0], i) for i in range(400)]
    train, test = split_rows(rows, test_size=0.25, seed=3)
    assert (train, test) == split_rows(rows, test_size=0.25, seed=3)
    assert test != split_rows(rows, test_size=0.25, seed=4)[1]
    assert sorted(r.where for r in train + test) == sorted(r.where for r in rows)
    assert Counter(r.label for r in test) == {"a": 76, "b": 26}
    assert not {r.text for r in train} & {r.text for r in test}
    assert len(split_rows(rows, test_size=40, seed=0)[1]) == 40


def test_a_number_of_test_rows_is_that_number_over_many_classes() -> None:
    rows = [row(f"text {i}", str(i % 10), i) for i in range(100)]
    for size in (5, 15, 33):
        assert len(split_rows(rows, test_size=size, seed=0)[1]) == size


def test_a_split_that_leaves_a_side_empty_is_refused() -> None:
    with pytest.raises(DataError, match="both sides"):
        split_rows([row("a", "a", 1)], test_size=0.2, seed=0)


def test_test_rows_come_from_their_own_file_their_own_split_or_are_set_aside(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"q{i}", "completion": "a"}) + "\n" for i in range(10)]
    (tmp_path / "train.jsonl").write_text("".join(lines), "utf-8")
    alone = read_rows(Data(train=str(tmp_path / "train.jsonl"), test_size=3))
    assert [len(part) for part in alone] == [7, 3]
    (tmp_path / "test.jsonl").write_text(lines[0], "utf-8")
    assert [len(part) for part in read_rows(Data(train=str(tmp_path)))] == [10, 1]
    assert [len(part) for part in read_rows(Data(train=str(tmp_path / "train.jsonl"), max_train_rows=4))] == [4, 2]


REAL = {
    "online_shopping_10_cats/test.csv": (
        {"columns": Columns(text="review", label="label"), "labels": ["负面", "正面"]},
        1998,
    ),
    "sst2_sentence/dev.tsv": (
        {"columns": Columns(text=0, label=1), "header": False, "labels": ["negative", "positive"]},
        872,
    ),
    "llamafactory_demo/alpaca_zh_demo.json": ({}, 1000),
    "chatlm_zh_sft_sample/valid.jsonl": ({"columns": Columns(text="prompt", answer="response")}, 1000),
    "tatoeba_en_zh/test.tsv": ({"columns": Columns(text=0, answer=1), "header": False}, 1055),
}


@pytest.mark.parametrize("name", sorted(REAL))
def test_real_sets_are_read_whole(shared: Path, name: str) -> None:
    options, count = REAL[name]
    assert len(read_rows_of(Data(train=str(shared / "data" / name), **options))) == count
