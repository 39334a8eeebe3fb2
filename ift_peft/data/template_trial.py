"""A chat template rendered on a few conversations, in a process of bounded memory and time (`ift_peft.trial`)."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

LARGEST_FACTOR = 1000


class _Generation(jinja2.ext.Extension):
    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> Any:
        return caller()


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def trial(given: dict[str, Any]) -> str | None:
    """Render the `template` in `given` for its `conversations`, with its `special` tokens.

    Returns what in it takes one step of Python that no clock can stop, None where there is nothing of it. Its errors
    are left for the renderer, which meets them again, and tells them.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda text: datetime.now().strftime(text)}
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    try:
        if endless := _endless(environment.parse(given["template"])):
            return endless
        compiled = environment.from_string(given["template"])
    except (MemoryError, RecursionError):
        raise
    except Exception:  # a syntax error, or a number of too many digits
        return None
    for messages in given["conversations"]:
        for prompt in (False, True):
            try:
                compiled.render(
                    messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **given["special"]
                )
            except (MemoryError, RecursionError):
                raise
            except Exception as error:  # whatever a template raises
                del error
    return None


def _endless(template: nodes.Template) -> str | None:
    """The first power, or product of two things of any size: 10 ** 10 ** 10 is one step, in C."""
    for power in template.find_all(nodes.Pow):
        return f"a power, at line {power.lineno}"
    for product in template.find_all(nodes.Mul):
        factors = [one.value for one in (product.left, product.right) if isinstance(one, nodes.Const)]
        if not any(isinstance(one, int | float) and abs(one) <= LARGEST_FACTOR for one in factors):
            return f"a product without a factor of at most {LARGEST_FACTOR:,}, at line {product.lineno}"
    return None
