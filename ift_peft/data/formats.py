"""From one stored record, in any of the known formats, to one row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ift_peft.data.fields import Record, RecordFault, cell, kind, string, text_of, unfold
from ift_peft.data.row import Message, Row, ask
from ift_peft.errors import DataError, IftPeftError
from ift_peft.plain_files import NOT_TEXT
from ift_peft.sections import Columns, Data
from ift_peft.stages import HOLE

ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "observation": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
}


def to_rows(records: Iterable[Record], data: Data, faults: list[IftPeftError]) -> list[Row]:
    """A row for every usable record, or record inside it (`data.records`); the others are appended to `faults`."""
    rows = []
    for record in records if data.records is None else unfold(records, data.records, faults):
        try:
            rows.append(to_row(record, data))
        except RecursionError:
            faults.append(
                DataError(
                    expected="a row", found=f"lists nested too deeply at {record.where}", fix="repair or remove the row"
                )
            )
        except RecordFault as fault:
            expected, found, fix = fault.args
            faults.append(DataError(expected=expected, found=f"{found} at {record.where}", fix=fix))
    return rows


def to_row(record: Record, data: Data) -> Row:
    """The row of one record. Raises `RecordFault` where it cannot be used."""
    form = data.format if data.format != "auto" else _detect(record.values, data)
    if form in ("messages", "sharegpt") and (data.instruction is not None or data.instructions is not None):
        raise RecordFault(
            "no data.instruction for rows that hold whole conversations",
            "several in data.instructions" if data.instruction is None else f"{data.instruction!r}",
            "set data.instruction=null and data.instructions=null, or put it into the rows",
        )
    row = _FORMATS[form](record, data)
    _check(row.messages)
    if data.labels is not None and row.label is None:
        label = _label(row.answer, data)
        return replace(row, messages=(*row.prompt, {"role": "assistant", "content": label}), label=label)
    return row


def _detect(values: dict[str, Any], data: Data) -> str:
    if data.columns != Columns():
        return "columns"
    for form, keys in (
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("prompt_completion", {"prompt", "completion"}),
        ("prompt_completion", {"prompt", "response"}),
        ("alpaca", {"instruction", "output"}),
        ("columns", {"text", "label"}),
        ("columns", {"text", "answer"}),
    ):
        if keys <= values.keys():
            return form
    fix = "name yours: data.columns.text=… data.columns.label=… (or data.columns.answer=…)"
    for name, value in values.items():
        if isinstance(value, list) and value and all(isinstance(element, dict) for element in value):
            fix += f"; rows that lie inside {name!r}: data.records={f'{data.records}.' if data.records else ''}{name}"
    raise RecordFault(
        "messages, conversations, prompt + completion or response, instruction + output, or text + label",
        f"columns {', '.join(map(str, values)):.300}",
        fix,
    )


def _prompt(text: str, data: Data, *, system: str | None = None) -> tuple[Message, ...]:
    return ask(text, instruction=data.instruction, system=system or data.system, labels=data.label_words)


def _from_messages(record: Record, data: Data) -> Row:
    messages = record.values.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RecordFault(
            "messages to be a list of {role, content}", type(messages).__name__, "see the README for the formats"
        )
    turns = tuple({"role": str(message.get("role")), "content": string(message, "content")} for message in messages)
    if data.system and turns and turns[0]["role"] != "system":
        turns = ({"role": "system", "content": data.system}, *turns)
    return Row(turns, record.where)


def _from_sharegpt(record: Record, data: Data) -> Row:
    """Turns of {from, value}. Tool calls are text: no template of a base and no tool is run for them.

    A function_call is an answer whose content is the call as written, learnt like every answer; an observation is the
    user's next turn; `tools` follows the system message on a new line, or is that message.
    """
    turns = record.values.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RecordFault(
            "conversations to be a list of {from, value}", type(turns).__name__, "see the README for the formats"
        )
    messages = []
    for turn in turns:
        role = _SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise RecordFault(
                f"from to be one of {', '.join(_SHAREGPT_ROLES)}",
                _cut(repr(turn.get("from"))),
                "rename or remove the turn",
            )
        messages.append({"role": role, "content": string(turn, "value")})
    begun = bool(messages) and messages[0]["role"] == "system"
    system = messages[0]["content"] if begun else record.values.get("system") or data.system
    head = [str(part) for part in (system, _tools(record.values)) if part]
    if head and messages:
        messages[: int(begun)] = [{"role": "system", "content": "\n".join(head)}]
    return Row(tuple(messages), record.where)


def _tools(values: dict[str, Any]) -> str:
    """The tools as they are written, empty where there are none. Stored as a list, they become one line of JSON."""
    tools = values.get("tools") or ""
    if isinstance(tools, list):
        tools = json.dumps(tools, ensure_ascii=False)
    if not isinstance(tools, str):
        raise RecordFault("tools to be text or a list", kind(tools), "repair or remove them")
    return "" if tools.strip() in ("", "[]") else tools


def _from_prompt_completion(record: Record, data: Data) -> Row:
    """`prompt` with `completion`, which goes before `response`."""
    answer = "response" if "response" in record.values and "completion" not in record.values else "completion"
    question = string(record.values, "prompt")
    completion = {"role": "assistant", "content": string(record.values, answer)}
    return Row((*_prompt(question, data), completion), record.where, text=question)


def _from_alpaca(record: Record, data: Data) -> Row:
    """The question is `instruction`, and `input` on a new line; `history` holds the turns before it."""
    given = record.values.get("input")
    if given is not None and not isinstance(given, str):
        raise RecordFault("text under 'input'", kind(given), "set 'input' to a string")
    question = string(record.values, "instruction") + (f"\n{given}" if given and given.strip() else "")
    *system, asked = _prompt(question, data, system=record.values.get("system"))
    answer = {"role": "assistant", "content": string(record.values, "output")}
    return Row((*system, *_history(record.values), asked, answer), record.where, text=question)


def _history(values: dict[str, Any]) -> list[Message]:
    """Earlier turns as messages; their answers are learnt like every answer."""
    turns = values.get("history") or []
    messages = []
    for turn in turns if isinstance(turns, list) else [turns]:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(part, str) for part in turn):
            raise RecordFault(
                "history to be a list of [question, answer]", f"{turn!r:.60}", "repair it, or store the row as messages"
            )
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def _from_columns(record: Record, data: Data) -> Row:
    columns = data.columns
    text = text_of(record.values, columns.text)
    prompt = _prompt(text, data)
    if data.labels is not None:
        label = _label(cell(record.values, "label" if columns.label is None else columns.label), data)
        return Row((*prompt, {"role": "assistant", "content": label}), record.where, label, text)
    column = columns.answer if columns.answer is not None else "answer" if columns.label is None else columns.label
    template = str(column) not in record.values and HOLE.search(str(column))
    value = text_of(record.values, column) if template else cell(record.values, column)
    if isinstance(value, dict | list):
        inner = "0" if isinstance(value, list) else next(iter(value), "…")
        raise RecordFault(
            f"text under {column!r}", kind(value), f"name a part of it, as data.columns.answer={column}.{inner}"
        )
    answer = {"role": "assistant", "content": "" if value is None else str(value)}
    return Row((*prompt, answer), record.where, text=text, tests=_tests(record.values, columns))


def _tests(values: dict[str, Any], columns: Columns) -> str | None:
    """The tests of an answer that is code: a program, or a list of its lines."""
    if columns.tests is None:
        return None
    tests = cell(values, columns.tests)
    lines = tests if isinstance(tests, list) else [tests]
    if not lines or not all(isinstance(line, str) and line.strip() for line in lines):
        raise RecordFault(f"tests under {columns.tests!r}", kind(tests), "write a program, or a list of its lines")
    return "\n".join(lines)


_FORMATS: dict[str, Callable[[Record, Data], Row]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "prompt_completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
    "columns": _from_columns,
}


def _label(value: Any, data: Data) -> str:
    """The label word of a stored value: itself, its entry in a mapping, or its position in a list."""
    labels, stored = data.labels, str(value).strip()
    assert labels is not None
    if isinstance(labels, dict) and stored in labels:
        return labels[stored]
    numbered = False
    if isinstance(labels, tuple):
        if stored in labels:
            return stored
        numbered = not any(word.isdigit() for word in labels)
        if numbered and stored.isdecimal() and int(stored) < len(labels):
            return labels[int(stored)]
    raise RecordFault(
        f"a label out of {', '.join(labels)}" + (f" or 0 to {len(labels) - 1}" if numbered else ""),
        _cut(repr(value)),
        "add it to data.labels, or repair the row",
    )


def _cut(told: str) -> str:
    """What faults show of a stored value: its beginning, where it is long."""
    return told if len(told) <= 200 else f"{told[:200]}… ({len(told):,} characters)"


def _check(messages: Sequence[Message]) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        raise RecordFault(
            "the conversation to end with the assistant",
            "none" if not messages else messages[-1]["role"],
            "add the answer",
        )
    for message in messages:
        if wrong := NOT_TEXT.search(message["content"]):
            what = "the character U+0000" if wrong[0] == "\0" else f"half of a surrogate pair, {wrong[0]!a},"
            raise RecordFault("whole characters", what, "repair the text")
    unknown = [message["role"] for message in messages if message["role"] not in ROLES]
    if unknown:
        raise RecordFault(f"roles out of {', '.join(ROLES)}", _cut(", ".join(sorted(set(unknown)))), "rename the role")
    if len(messages) < 2 or all(message["role"] != "user" for message in messages):
        raise RecordFault("a user message before the answer", "none", "add the question")
    if any(message["role"] == "assistant" and not message["content"].strip() for message in messages):
        raise RecordFault("an answer with text", "an empty answer", "fill the answer or remove the row")
