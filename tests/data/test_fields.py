from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ift_peft.data.rows import read_rows_of
from ift_peft.errors import Faults
from ift_peft.recipe import load_recipe
from ift_peft.sections import Columns, Data
from tests.data.test_formats import message_of, rows_of, turns

ARTICLE = {
    "id": "article",
    "title": "t",
    "paragraphs": [
        {"context": "c0", "qas": [{"id": "q", "question": "q00", "answers": [{"text": "a00"}, {"text": "b"}]}]},
        {"context": "c1", "qas": []},
        {
            "context": "{question}",
            "qas": [{"question": "q20", "answers": [{"text": "a20"}]}, {"question": "q21", "answers": [{"text": 21}]}],
        },
    ],
}
SQUAD = {"records": "paragraphs.qas", "columns": Columns(text="{context}\n问：{question}", answer="answers.0.text")}


def test_rows_inside_records_inherit_what_they_lack(tmp_path: Path) -> None:
    columns = Columns(text="{id}/{title}/{context}", answer="question")
    rows = rows_of(tmp_path, ARTICLE, records="paragraphs.qas", columns=columns)
    assert [row.text for row in rows] == ["q/t/c0", "article/t/{question}", "article/t/{question}"]


def test_rows_inside_records_are_named_by_their_place(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, ARTICLE, ARTICLE, **SQUAD)
    places = ["paragraphs.0.qas.0", "paragraphs.2.qas.0", "paragraphs.2.qas.1"]
    assert [row.where for row in rows] == [f"{tmp_path}/rows.jsonl:{line} {at}" for line in (1, 2) for at in places]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "1", "data": [ARTICLE]}), "utf-8")
    assert [row.where for row in read_rows_of(Data(train=str(path), **SQUAD))] == [
        f"{path} row 1 {at}" for at in places
    ]


def test_a_text_is_made_of_several_fields_and_an_answer_found_at_a_path(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, ARTICLE, **SQUAD)
    asked = ["c0\n问：q00", "{question}\n问：q20", "{question}\n问：q21"]  # braces of a value are left as they are
    assert [turns(row) for row in rows] == [
        [("user", text), ("assistant", answer)] for text, answer in zip(asked, ("a00", "a20", "21"), strict=True)
    ]
    assert [row.text for row in rows] == asked


def test_paths_lead_through_objects_and_give_labels_too(tmp_path: Path) -> None:
    record = {"meta": {"lang": "zh", "rows": [{"doc": {"body": "好"}, "votes": ["pos", "neg"], "stars": 5}]}}
    (row,) = rows_of(
        tmp_path,
        record,
        records="meta.rows",
        columns=Columns(text="[{lang}] {doc.body} {stars}", label="votes.0"),
        labels={"pos": "正面", "neg": "负面"},
    )
    assert (row.text, row.label) == ("[zh] 好 5", "正面")
    assert row.where == f"{tmp_path}/rows.jsonl:1 meta.rows.0"


def test_a_column_of_that_very_name_goes_before_a_path_or_a_template(tmp_path: Path) -> None:
    record = {"a.b": "name", "a": {"b": "path"}, "{a.b}": "braces", "answer": "x"}
    assert [row.text for row in rows_of(tmp_path, record, columns=Columns(text="a.b"))] == ["name"]
    assert [row.text for row in rows_of(tmp_path, record, columns=Columns(text="{a.b}"))] == ["braces"]
    assert [row.text for row in rows_of(tmp_path, record, columns=Columns(text="{a.b}!"))] == ["name!"]


def test_instances_of_an_instruction_are_alpaca_rows(tmp_path: Path) -> None:
    record = {
        "id": "task",
        "instruction": "Add.",
        "instances": [{"input": "1 1", "output": "2"}, {"input": "", "output": "3", "instruction": "Own."}],
    }
    rows = rows_of(tmp_path, record, records="instances")
    assert [turns(row) for row in rows] == [
        [("user", "Add.\n1 1"), ("assistant", "2")],
        [("user", "Own."), ("assistant", "3")],
    ]


@pytest.mark.parametrize(
    ("record", "records", "name", "found", "fix"),
    [
        (
            ARTICLE,
            "paragraph.qas",
            "paragraph",
            "fields id, title, paragraphs",
            "did you mean data.records=paragraphs.qas?",
        ),
        (
            ARTICLE,
            "data.paragraphs.qas",
            "data",
            "fields id, title, paragraphs",
            "did you mean data.records=paragraphs.qas?",
        ),
        (ARTICLE, "title", "title", "str under 'title'", "name a list out of paragraphs: data.records=paragraphs"),
        (
            {"a": {"b": [{"c": "text"}]}},
            "a.b.c",
            "c",
            "str under 'c' at rows.jsonl:1 a.b.0",
            "end the path there: data.records=a.b",
        ),
        (
            {"a": {"b": [], "c": []}},
            "a",
            "a",
            "dict under 'a'",
            "go on to a list in it: data.records=a.b",
        ),
        (
            {"text": "q", "answer": "a"},
            "rows",
            "rows",
            "fields text, answer",
            "fill or remove the row, or set data.records=null to take each record as one row",
        ),
        (
            {"a": [{"b": None, "cs": []}]},
            "a.b",
            "b",
            "nothing under 'b' at rows.jsonl:1 a.0",
            "name a list out of cs: data.records=a.cs",
        ),
        (
            {"a": [{"d": 1, "cs": []}]},
            "a.c",
            "c",
            "fields d, cs at rows.jsonl:1 a.0",
            "did you mean data.records=a.cs?",
        ),
    ],
)
def test_a_list_that_is_not_there_is_a_fault(
    tmp_path: Path, record: dict[str, Any], records: str, name: str, found: str, fix: str
) -> None:
    found += "" if " at " in found else " at rows.jsonl:1"
    assert message_of(tmp_path, record, records=records) == (
        f"expected a list {name!r} (data.records={records})\n   found {found}\n     fix {fix}"
    )


def test_a_list_that_is_not_there_is_a_fault_of_each_record(tmp_path: Path) -> None:
    with pytest.raises(Faults) as caught:
        rows_of(tmp_path, ARTICLE, {"paragraphs": [{"qas": []}]}, ARTICLE, records="paragraph.qas")
    assert [str(fault).count(f"rows.jsonl:{line}") for line, fault in enumerate(caught.value.faults, 1)] == [1, 1, 1]


def test_a_list_of_no_objects_is_a_fault_and_the_good_rows_are_still_checked(tmp_path: Path) -> None:
    record = {"instruction": "q", "instances": ["a", {"output": ""}]}
    with pytest.raises(Faults) as caught:
        rows_of(tmp_path, record, records="instances")
    assert [str(fault).replace(f"{tmp_path}/", "") for fault in caught.value.faults] == [
        "expected objects in 'instances' (data.records=instances)\n"
        "   found str at rows.jsonl:1 instances.0\n"
        "     fix name a list of objects, or set data.records=null to take each record as one row",
        "expected an answer with text\n"
        "   found an empty answer at rows.jsonl:1 instances.1\n"
        "     fix fill the answer or remove the row",
    ]


ONE = {"question": "q", "context": " ", "empty": "", "none": None, "tags": [], "answers": [{"text": "a", "start": 1}]}
FIELDS = "columns question, context, empty, none, tags, answers"


@pytest.mark.parametrize(
    ("columns", "expected", "found", "fix"),
    [
        ({"text": "{questoin}"}, "a column 'questoin'", FIELDS, "did you mean 'question'?"),
        ({"answer": "answer.0.text"}, "a column 'answer.0.text'", FIELDS, "did you mean 'answers.0.text'?"),
        (
            {"answer": "answers.0.txt"},
            "a value at 'answers.0.txt'",
            "fields text, start under 'answers.0'",
            "did you mean 'answers.0.text'?",
        ),
        (
            {"answer": "answers.0.said"},
            "a value at 'answers.0.said'",
            "fields text, start under 'answers.0'",
            "name one of them",
        ),
        (
            {"answer": "answers.1.text"},
            "a value at 'answers.1.text'",
            "elements 0 to 0 under 'answers'",
            "number the element from 0, as in 'answers.0'",
        ),
        ({"answer": "tags.0"}, "a value at 'tags.0'", "no elements under 'tags'", "fill or remove the row"),
        ({"answer": "none.text"}, "a value at 'none.text'", "nothing under 'none'", "fill or remove the row"),
        (
            {"answer": "answers.0.text.0"},
            "a value at 'answers.0.text.0'",
            "str under 'answers.0.text'",
            "end the path there: 'answers.0.text'",
        ),
        (
            {"answer": "answers"},
            "text under 'answers'",
            "list",
            "name a part of it, as data.columns.answer=answers.0",
        ),
        (
            {"answer": "answers.0"},
            "text under 'answers.0'",
            "dict",
            "name a part of it, as data.columns.answer=answers.0.text",
        ),
        (
            {"text": "{question}{none}"},
            "text or a number under 'none', for the template in data.columns",
            "nothing",
            "fill or remove the row",
        ),
        (
            {"text": "{question}{tags}"},
            "text or a number under 'tags', for the template in data.columns",
            "list",
            "name a field that holds text",
        ),
        ({"text": "问：{context}{empty}"}, "text under 'context' or 'empty'", "empty cells", "fill or remove the row"),
        ({"text": "context"}, "text under 'context'", "an empty cell", "fill or remove the row"),
        ({"text": "answers.0.start"}, "text under 'answers.0.start'", "int", "choose the column that holds the text"),
    ],
)
def test_what_a_template_or_a_path_does_not_find_is_named(
    tmp_path: Path, columns: dict[str, str], expected: str, found: str, fix: str
) -> None:
    columns = {"text": "question", "answer": "answers.0.text", **columns}
    assert message_of(tmp_path, ONE, columns=Columns(**columns)) == (
        f"expected {expected}\n   found {found} at rows.jsonl:1\n     fix {fix}"
    )


def test_the_way_to_rows_inside_unknown_records_is_told(tmp_path: Path) -> None:
    for records, way, place in ((None, "paragraphs", ""), ("paragraphs", "paragraphs.qas", " paragraphs.0")):
        message = message_of(tmp_path, {"paragraphs": ARTICLE["paragraphs"][:1]}, records=records)
        assert message.startswith("expected messages, conversations, prompt + completion or response, instruction + ")
        assert f" at rows.jsonl:1{place}\n" in message
        assert message.endswith(f"; rows that lie inside {way.split('.')[-1]!r}: data.records={way}")


def test_a_recipe_alone_says_where_text_and_answer_lie(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps({"data": [ARTICLE]}), "utf-8")
    recipe = tmp_path / "squad.yaml"
    recipe.write_text(
        "data:\n  train: train.json\n  records: paragraphs.qas\n  columns:\n"
        '    text: "{context}\\n问：{question}"\n    answer: answers.0.text\n',
        "utf-8",
    )
    assert read_rows_of(load_recipe(str(recipe)).data)[0].text == "c0\n问：q00"
    data = load_recipe(str(recipe), ['data.columns.text="{question}？\\n{context}"']).data
    assert read_rows_of(data)[0].text == "q00？\nc0"
