"""From one stored record, in any of the known formats, to one row."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from ift_peft.data.row import Message, Row, ask
from ift_peft.data.sources import Record
from ift_peft.errors import DataError, IftPeftError
from ift_peft.sections import Columns, Data

ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class _Fault(Exception):
    """What is wrong with one record: expected, found, fix."""


def to_rows(records: Sequence[Record], data: Data, faults: list[IftPeftError]) -> list[Row]:
    """A row for every usable record; the others are appended to `faults`."""
    rows = []
    for record in records:
        try:
            rows.append(_to_row(record, data))
        except _Fault as fault:
            expected, found, fix = fault.args
            faults.append(DataError(expected=expected, found=f"{found} at {record.where}", fix=fix))
    return rows


def _to_row(record: Record, data: Data) -> Row:
    form = data.format if data.format != "auto" else _detect(record.values, data.columns)
    if form in ("messages", "sharegpt") and data.instruction is not None:
        raise _Fault(
            "no data.instruction for rows that hold whole conversations",
            f"{data.instruction!r}",
            "set data.instruction=null, or put it into the rows",
        )
    row = _FORMATS[form](record, data)
    _check(row.messages)
    if data.labels is not None and row.label is None:
        label = _label(row.answer, data)
        return Row((*row.prompt, {"role": "assistant", "content": label}), row.where, label)
    return row


def _detect(values: dict[str, Any], columns: Columns) -> str:
    if columns.label is not None or columns.answer is not None:
        return "columns"
    for form, keys in (
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("prompt_completion", {"prompt", "completion"}),
        ("alpaca", {"instruction", "output"}),
        ("columns", {"text", "label"}),
        ("columns", {"text", "answer"}),
    ):
        if keys <= values.keys():
            return form
    raise _Fault(
        "messages, conversations, prompt + completion, instruction + output, or text + label",
        f"columns {', '.join(map(str, values))}",
        "name yours: data.columns.text=… data.columns.label=… (or data.columns.answer=…)",
    )


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        raise _Fault(
            f"text under {key!r}", "nothing" if value is None else type(value).__name__, f"set {key!r} to a string"
        )
    return value


def _cell(values: dict[str, Any], column: str | int) -> Any:
    key = str(column)
    if key not in values:
        near = difflib.get_close_matches(key, [str(name) for name in values], n=1)
        raise _Fault(
            f"a column {key!r}",
            f"columns {', '.join(map(str, values))}",
            f"did you mean {near[0]!r}?"
            if near
            else "set data.columns, or data.header=false for a file without a header",
        )
    return values[key]


def _from_messages(record: Record, data: Data) -> Row:
    messages = record.values.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _Fault(
            "messages to be a list of {role, content}", type(messages).__name__, "see the README for the formats"
        )
    turns = tuple({"role": str(message.get("role")), "content": _text(message, "content")} for message in messages)
    if data.system and turns and turns[0]["role"] != "system":
        turns = ({"role": "system", "content": data.system}, *turns)
    return Row(turns, record.where)


def _from_sharegpt(record: Record, data: Data) -> Row:
    turns = record.values.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _Fault(
            "conversations to be a list of {from, value}", type(turns).__name__, "see the README for the formats"
        )
    messages = []
    for turn in turns:
        role = _SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise _Fault(
                f"from to be one of {', '.join(_SHAREGPT_ROLES)}", repr(turn.get("from")), "rename or remove the turn"
            )
        messages.append({"role": role, "content": _text(turn, "value")})
    system = record.values.get("system") or data.system
    if system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": str(system)})
    return Row(tuple(messages), record.where)


def _from_prompt_completion(record: Record, data: Data) -> Row:
    prompt = ask(_text(record.values, "prompt"), instruction=data.instruction, system=data.system)
    return Row((*prompt, {"role": "assistant", "content": _text(record.values, "completion")}), record.where)


def _from_alpaca(record: Record, data: Data) -> Row:
    given = record.values.get("input")
    if record.values.get("history"):
        raise _Fault("Alpaca rows without history", "history", "store these rows as messages")
    if given is not None and not isinstance(given, str):
        raise _Fault("text under 'input'", type(given).__name__, "set 'input' to a string")
    question = _text(record.values, "instruction") + (f"\n{given}" if given and given.strip() else "")
    prompt = ask(question, instruction=data.instruction, system=record.values.get("system") or data.system)
    return Row((*prompt, {"role": "assistant", "content": _text(record.values, "output")}), record.where)


def _from_columns(record: Record, data: Data) -> Row:
    columns = data.columns
    text = _cell(record.values, columns.text)
    if not isinstance(text, str):
        raise _Fault(f"text under {columns.text!r}", type(text).__name__, "choose the column that holds the text")
    if not text.strip():
        raise _Fault(f"text under {columns.text!r}", "an empty cell", "fill or remove the row")
    prompt = ask(text, instruction=data.instruction, system=data.system)
    if data.labels is not None:
        label = _label(_cell(record.values, "label" if columns.label is None else columns.label), data)
        return Row((*prompt, {"role": "assistant", "content": label}), record.where, label, text)
    answer = columns.answer if columns.answer is not None else "answer" if columns.label is None else columns.label
    value = _cell(record.values, answer)
    return Row(
        (*prompt, {"role": "assistant", "content": "" if value is None else str(value)}), record.where, text=text
    )


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
    raise _Fault(
        f"a label out of {', '.join(labels)}" + (f" or 0 to {len(labels) - 1}" if numbered else ""),
        repr(value),
        "add it to data.labels, or repair the row",
    )


def _check(messages: Sequence[Message]) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        raise _Fault(
            "the conversation to end with the assistant",
            "none" if not messages else messages[-1]["role"],
            "add the answer",
        )
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise _Fault(
                "whole characters", f"half of a surrogate pair, {error.object[error.start]!a},", "repair the text"
            ) from None
    unknown = [message["role"] for message in messages if message["role"] not in ROLES]
    if unknown:
        raise _Fault(f"roles out of {', '.join(ROLES)}", ", ".join(sorted(set(unknown))), "rename the role")
    if len(messages) < 2 or all(message["role"] != "user" for message in messages):
        raise _Fault("a user message before the answer", "none", "add the question")
    if any(message["role"] == "assistant" and not message["content"].strip() for message in messages):
        raise _Fault("an answer with text", "an empty answer", "fill the answer or remove the row")
