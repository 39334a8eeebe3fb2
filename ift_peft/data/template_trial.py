"""A chat template tried on a few conversations in a process of its own, whose memory and time are bounded.

Run as a script, with the template and conversations as JSON on standard input. Ends with TOO_MUCH where rendering takes
more than the process may have; any other error is left for the renderer to tell, which renders the same way.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

TOO_MUCH = 9
SECONDS = 5  # of a processor
BYTES = 1 << 30


class _Generation(jinja2.ext.Extension):
    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> Any:
        return caller()


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _render(template: str, conversations: list[Any], special: dict[str, str]) -> None:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda text: datetime.now().strftime(text)}
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    compiled = environment.from_string(template)
    for messages in conversations:
        for prompt in (False, True):
            try:
                compiled.render(messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **special)
            except MemoryError:
                raise
            except Exception as error:  # whatever a template raises, the renderer meets it again, and tells it
                del error


def main() -> None:
    given = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        _render(given["template"], given["conversations"], given["special"])
    except (MemoryError, RecursionError):
        sys.exit(TOO_MUCH)
    except Exception:  # as above, of compiling
        sys.exit(0)


if __name__ == "__main__":
    main()
