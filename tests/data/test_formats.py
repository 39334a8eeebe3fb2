from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ift_peft.data.fields import Record
from ift_peft.data.formats import to_rows
from ift_peft.data.row import Row
from ift_peft.data.rows import read_rows_of
from ift_peft.errors import DataError, IftPeftError
from ift_peft.sections import Columns, Data


def rows_of(tmp_path: Path, *records: dict[str, Any], **options: Any) -> list[Row]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return read_rows_of(Data(train=str(path), **options))


def message_of(tmp_path: Path, *records: dict[str, Any], **options: Any) -> str:
    """What the user is told, with the folder left out."""
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, *records, **options)
    return str(caught.value).replace(f"{tmp_path}/", "")


def turns(row: Row) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in row.messages]


def test_a_prompt_goes_with_a_response_as_with_a_completion(tmp_path: Path) -> None:
    given = {"prompt": "q", "response": "a"}
    both = {**given, "completion": "c"}
    assert [row.answer for row in rows_of(tmp_path, given, both)] == ["a", "c"]
    (row,) = rows_of(tmp_path, given, format="prompt_completion")
    assert turns(row) == [("user", "q"), ("assistant", "a")]
    (row,) = rows_of(tmp_path, given, columns=Columns(text="prompt", answer="response"))
    assert (turns(row), row.text) == ([("user", "q"), ("assistant", "a")], "q")


def test_alpaca_history_stands_between_the_system_message_and_the_question(tmp_path: Path) -> None:
    record = {"instruction": "q3", "input": "x", "output": "a3", "history": [["q1", "a1"], ["q2", "a2"]], "system": "s"}
    (row,) = rows_of(tmp_path, record)
    assert turns(row) == [
        ("system", "s"),
        *(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")),
        *(("user", "q3\nx"), ("assistant", "a3")),
    ]
    for empty in ([], None):
        (row,) = rows_of(tmp_path, {**record, "history": empty})
        assert turns(row) == [("system", "s"), ("user", "q3\nx"), ("assistant", "a3")]


@pytest.mark.parametrize(
    ("history", "found"), [([["q", "a"], ["q"]], "['q']"), ([{"q": "a"}], "{'q': 'a'}"), ("q", "'q'")]
)
def test_a_history_of_another_form_is_refused(tmp_path: Path, history: Any, found: str) -> None:
    assert message_of(tmp_path, {"instruction": "q", "output": "a", "history": history}) == (
        "expected history to be a list of [question, answer]\n"
        f"   found {found} at rows.jsonl:1\n"
        "     fix repair it, or store the row as messages"
    )


CALLED = [
    {"from": "human", "value": "天气？"},
    {"from": "function_call", "value": '{"name": "weather"}'},
    {"from": "observation", "value": '{"sky": "晴"}'},
    {"from": "gpt", "value": "晴。"},
]
AS_TEXT = [("user", "天气？"), ("assistant", '{"name": "weather"}'), ("user", '{"sky": "晴"}'), ("assistant", "晴。")]


def test_tool_calls_are_answers_and_what_tools_return_is_a_question(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, {"conversations": CALLED})
    assert turns(row) == AS_TEXT


@pytest.mark.parametrize(
    ("record", "options", "system"),
    [
        ({"tools": '[{"name":  "天气"}]'}, {}, '[{"name":  "天气"}]'),
        ({"tools": [{"name": "天气"}]}, {}, '[{"name": "天气"}]'),
        ({"tools": "t"}, {"system": "s"}, "s\nt"),
        ({"tools": "t", "system": "own"}, {"system": "s"}, "own\nt"),
        ({"tools": "t", "conversations": [{"from": "system", "value": "turn"}, *CALLED]}, {"system": "s"}, "turn\nt"),
        ({"tools": "[]"}, {"system": "s"}, "s"),
        ({"tools": []}, {"system": "s"}, "s"),
    ],
)
def test_tools_follow_the_system_message(
    tmp_path: Path, record: dict[str, Any], options: dict[str, Any], system: str
) -> None:
    (row,) = rows_of(tmp_path, {"conversations": CALLED, **record}, **options)
    assert turns(row) == [("system", system), *AS_TEXT]


def test_tools_and_roles_of_another_form_are_refused(tmp_path: Path) -> None:
    assert message_of(tmp_path, {"conversations": CALLED, "tools": 3}) == (
        "expected tools to be text or a list\n   found int at rows.jsonl:1\n     fix repair or remove them"
    )
    assert message_of(tmp_path, {"conversations": [{"from": "tool", "value": "x"}]}) == (
        "expected from to be one of system, human, user, observation, gpt, assistant, function_call\n"
        "   found 'tool' at rows.jsonl:1\n"
        "     fix rename or remove the turn"
    )


def test_the_classes_stand_in_an_instruction_that_asks_for_them(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, {"text": "好", "label": 1}, labels=["负面", "正面"], instruction="从{labels}中选：")
    assert turns(row) == [("user", "从负面、正面中选：\n好"), ("assistant", "正面")]


SQUAD_ZH = {
    "records": "paragraphs.qas",
    "columns": Columns(text="{context}\n问题：{question}", answer="answers.0.text"),
}
REAL: dict[str, tuple[dict[str, Any], int, list[tuple[str, str, str]]]] = {
    "cmrc2018/cmrc2018_dev.json": (
        SQUAD_ZH,
        3219,
        [
            ("user", "《战国无双3》（）是由光荣和ω-force开发的", "\n问题：《战国无双3》是由哪两个公司合作开发的？"),
            ("assistant", "光荣和ω-force", "光荣和ω-force"),
        ],
    ),
    "cmrc2018/cmrc2018_trial.json": (
        SQUAD_ZH,
        1002,
        [("user", "基于《跑跑卡丁车》与《泡泡堂》上", "\n问题：生命数耗完即算为什么？"), ("assistant", "踢爆", "踢爆")],
    ),
    "self_instruct_seed/seed_tasks.jsonl": (
        {"records": "instances"},
        175,
        [
            ("user", "Is there anything I can eat for a breakfast", "roughly 700-1000 calories?"),
            ("assistant", "Yes, you can have 1 oatmeal banana", "4 strips of bacon contains about 200 calories."),
        ],
    ),
    "chatlm_zh_sft_sample/train.jsonl": (
        {},
        3000,
        [
            ("user", "哪种牌子的鱼油纯度高？", "哪种牌子的鱼油纯度高？"),
            ("assistant", "澳洲留学党。鱼油是浓度越高越好。", "高血压关节炎都可以吃这个。"),
        ],
    ),
    "llamafactory_demo/alpaca_en_demo.json": (
        {},
        999,
        [
            ("user", "Describe a process of making crepes.", "Describe a process of making crepes."),
            ("assistant", "Making crepes is an easy and delicious process!", ""),
        ],
    ),
    "llamafactory_demo/alpaca_zh_demo.json": (
        {},
        1000,
        [
            ("user", "识别并解释给定列表中的两个科学理论：", "细胞理论和日心说。"),
            ("assistant", "细胞理论是生物科学的一个理论，", ""),
        ],
    ),
    "llamafactory_demo/identity.json": (
        {},
        91,
        [
            ("user", "hi", "hi"),
            ("assistant", "Hello! I am {{name}}, an AI assistant", "How can I assist you today?"),
        ],
    ),
    "llamafactory_demo/glaive_toolcall_zh_demo.json": (
        {},
        300,
        [
            ("system", '[{"name": "generate_invoice", "description": "生成发票"', '"required": ["length"]}}]'),
            ("user", "我需要为John Doe生成一张发票。", "以及3根香蕉，每根$0.5。"),
            (
                "assistant",
                '{"name": "generate_invoice", "arguments": {"customer_name": "约翰·多伊"',
                '"price": 0.5}]}}',
            ),
            ("user", '{"invoice_id": "INV12345"', '"total": 3.5, "status": "生成"}'),
            ("assistant", "发票已成功生成。", "总金额为$1.5。"),
        ],
    ),
}


@pytest.mark.parametrize("name", sorted(REAL))
def test_real_sets_load_by_recipe_alone(shared: Path, name: str) -> None:
    options, count, first = REAL[name]
    rows = read_rows_of(Data(train=str(shared / "data" / name), **options))
    assert len(rows) == len({row.where for row in rows}) == count
    assert len(rows[0].messages) == len(first)
    for (role, content), (expected_role, begins, ends) in zip(turns(rows[0]), first, strict=True):
        assert role == expected_role
        assert content.startswith(begins)
        assert content.endswith(ends)


def test_tests_of_code_are_a_program_or_its_lines() -> None:
    data = Data(train="x", columns=Columns(text="task", answer="code", tests="checks"))
    values = {"task": "Add.", "code": "def add(a, b):\n    return a + b"}
    faults: list[IftPeftError] = []
    records = [
        Record({**values, "checks": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}, "x:1"),
        Record({**values, "checks": "assert add(1, 2) == 3"}, "x:2"),
        Record({**values, "checks": []}, "x:3"),
    ]
    rows = to_rows(records, data, faults)
    assert [row.tests for row in rows] == ["assert add(1, 2) == 3\nassert add(0, 0) == 0", "assert add(1, 2) == 3"]
    assert [str(fault) for fault in faults if "tests under 'checks'" in str(fault) and "x:3" in str(fault)] != []
