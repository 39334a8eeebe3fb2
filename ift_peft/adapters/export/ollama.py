"""A Modelfile for Ollama: its Go template found from what the chat template makes of probes, and checked against it.

Ollama renders chats by a Go template and takes no Jinja. A chat template that puts each message between two texts of
its role, as most do, can be written as one; what the Go template would make of conversations with and without system
message, of one and several turns, must be what the chat template makes of them. Others are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ift_peft.data.render import Renderer
from ift_peft.data.row import Message
from ift_peft.errors import DataError, ExportError

_SYSTEM, _USER, _ANSWER = "Sys⁂tem", "Ques⁂tion", "Ans⁂wer"
_TAG = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
LARGEST_CONTEXT = 8192  # tokens of num_ctx beyond which Ollama's users choose for themselves: it is memory

Render = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class GoTemplate:
    """Texts around the messages of each role, before the answer, and instead of a system message that is not given."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    start: str
    no_system: str

    def text(self) -> str:
        """The template in Ollama's form, without white space of its own."""
        head = f"{_quoted(self.start)}{{{{ if .System }}}}{self._around(self.system, '.System')}"
        default = f"{{{{ else }}}}{_quoted(self.no_system)}" if self.no_system else ""
        turns = (
            f'{{{{ if eq .Role "user" }}}}{self._around(self.user, ".Content")}'
            f'{{{{ else if eq .Role "assistant" }}}}{self._around(self.assistant, ".Content")}{{{{ end }}}}'
        )
        return f"{head}{default}{{{{ end }}}}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{_quoted(self.prompt)}"

    def _around(self, texts: tuple[str, str], what: str) -> str:
        return f"{_quoted(texts[0])}{{{{ {what} }}}}{_quoted(texts[1])}"


def go_template(renderer: Renderer) -> GoTemplate:
    """The Go template that renders as the chat template does, checked on probes.

    Raises `ExportError` where there is none of the known form.
    """
    render = _prompt_of(renderer)
    try:
        found = _derive(render)
        faults = [probe for probe in _probes() if evaluate(found.text(), probe) != render(probe)]
    except (DataError, ValueError) as error:
        raise _refused(str(error)) from error
    if faults:
        raise _refused(f"other text for {json.dumps(list(faults[0]), ensure_ascii=False)[:160]}")
    return found


def modelfile(template: GoTemplate, *, gguf: str, stop: str, context: int, system: str | None) -> str:
    """The Modelfile for the file `gguf` beside it. Answers are greedy, as they were measured."""
    text = template.text()
    if '"""' in text or (system is not None and '"""' in system):
        raise _refused("three quotation marks in a row, which end a text of a Modelfile")
    lines = [
        f"FROM ./{gguf}",
        f'TEMPLATE """{text}"""',
        *([f'SYSTEM """{system}"""'] if system else []),
        f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}",
        f"PARAMETER num_ctx {min(context, LARGEST_CONTEXT)}",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
    ]
    return "\n".join(lines) + "\n"


def evaluate(template: str, messages: Sequence[Message]) -> str:
    """What Ollama makes of these messages by `template`, of the actions that `GoTemplate.text` writes.

    `.System` is the text of the system messages, `.Messages` are all of them (ollama/template/template.go, collate).
    Raises `ValueError` for any other action.
    """
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    pieces = _TAG.split(template)  # text, action, text, action, …
    return _Evaluation([piece.strip() if at % 2 else piece for at, piece in enumerate(pieces)], system, messages).run()


@dataclass(frozen=True)
class _Evaluation:
    """A template as texts (at even places) and actions (at odd ones), and what it is given."""

    pieces: Sequence[str]
    system: str
    messages: Sequence[Message]

    def run(self) -> str:
        return self._run(0, len(self.pieces), None)

    def _run(self, at: int, until: int, message: Message | None) -> str:
        """The places from `at` until before `until`, inside a range over `message` if any."""
        made = []
        while at < until:
            action = self.pieces[at]
            if at % 2 == 0:
                made.append(action)
            elif action.startswith(("if ", "range ")):
                stops = self._stops(at)
                made.append(self._block(at, stops, message))
                at = stops[-1]
            else:
                made.append(self._value(action, message))
            at += 1
        return "".join(made)

    def _value(self, action: str, message: Message | None) -> str:
        if action.startswith('"'):
            return str(json.loads(action))
        if action == ".System":
            return self.system
        if action == ".Content" and message is not None:
            return message["content"]
        raise ValueError(f"an action {action!r}")

    def _block(self, at: int, stops: Sequence[int], message: Message | None) -> str:
        if self.pieces[at] == "range .Messages":
            return "".join(self._run(at + 1, stops[-1], one) for one in self.messages)
        for start, stop in pairwise((at, *stops)):
            if self._holds(self.pieces[start].removeprefix("else").strip().removeprefix("if "), message):
                return self._run(start + 1, stop, message)
        return ""

    def _holds(self, condition: str, message: Message | None) -> bool:
        role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
        if role is not None and message is not None:
            return message["role"] == role[1]
        if condition not in ("", ".System"):
            raise ValueError(f"a condition {condition!r}")
        return not condition or bool(self.system)

    def _stops(self, at: int) -> list[int]:
        """The places of the `else` and `end` actions of the block that begins at `at`."""
        found, depth = [], 0
        for place in range(at + 2, len(self.pieces), 2):
            action = self.pieces[place]
            if depth == 0 and (action == "end" or action.startswith("else")):
                found.append(place)
                if action == "end":
                    return found
            depth += action.startswith(("if ", "range ")) - (action == "end")
        raise ValueError(f"no end of {self.pieces[at]!r}")


def _prompt_of(renderer: Renderer) -> Render:
    """The text up to where an answer begins, as training had it."""

    def render(messages: Sequence[Message]) -> str:
        (prompt,) = renderer.aligned([messages])
        return prompt.text

    return render


def _derive(render: Render) -> GoTemplate:
    """The texts around messages, from four renderings; whether they are right is for the caller to check."""
    user: Message = {"role": "user", "content": _USER}
    other: Message = {"role": "user", "content": f"{_USER}2"}
    answer: Message = {"role": "assistant", "content": _ANSWER}
    system: Message = {"role": "system", "content": _SYSTEM}
    alone, turns, with_system = render([user]), render([user, answer, other]), render([system, user])
    before, after_user, after_answer, end = _cut(turns, _USER, _ANSWER, f"{_USER}2")
    before_system, between = _cut(with_system, _SYSTEM, _USER)[:2]
    plain = _cut(alone, _USER)[0]
    # The user's own text is what stands before its message everywhere: after an answer, a system message, nothing.
    user_before = _common_end(after_answer, between, plain)
    assistant_after = after_answer.removesuffix(user_before)
    user_after = _common_start(end, after_user, assistant_after)
    start = _common_start(before_system, plain.removesuffix(user_before))
    return GoTemplate(
        system=(before_system.removeprefix(start), between.removesuffix(user_before)),
        user=(user_before, user_after),
        assistant=(after_user.removeprefix(user_after), assistant_after),
        prompt=end.removeprefix(user_after),
        start=start,
        no_system=before.removesuffix(user_before).removeprefix(start),
    )


def _cut(text: str, *marks: str) -> list[str]:
    """The texts between the marks, which must be there once each, in order."""
    found = []
    for mark in marks:
        before, there, text = text.partition(mark)
        if not there:
            raise ValueError(f"no place for {mark!r}")
        found.append(before)
    return [*found, text]


def _common_end(*texts: str) -> str:
    return _common_start(*(text[::-1] for text in texts))[::-1]


def _common_start(*texts: str) -> str:
    length = 0
    for characters in zip(*texts, strict=False):
        if len(set(characters)) > 1:
            break
        length += 1
    return texts[0][:length]


def _probes() -> list[list[Message]]:
    user: Message = {"role": "user", "content": "What is 2 + 2?\nAnswer <shortly>."}
    answer: Message = {"role": "assistant", "content": "It is 四."}
    system: Message = {"role": "system", "content": "You are {terse}."}
    more: Message = {"role": "user", "content": "And 3?"}
    turns = ([user], [user, answer, more], [user, answer, more, answer, user])
    return [*turns, *([system, *turn] for turn in turns)]


def _quoted(text: str) -> str:
    """Text as a Go template has it: braces that would open an action are put into one."""
    return text.replace("{{", '{{ "{{" }}')


def _refused(found: str) -> ExportError:
    return ExportError(
        expected="a chat template that Ollama's Go templates can say: each message between two texts of its role",
        found=found,
        fix="export --to gguf, and use llama.cpp's server, which takes the chat template as it is",
    )
