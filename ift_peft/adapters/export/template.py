"""The chat template as servers have it: without marks that only transformers knows, and with training's prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from ift_peft.data.render import Renderer
from ift_peft.data.row import Message
from ift_peft.errors import DataError, ExportError

_GENERATION = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")
_NO_THINKING = "{%- set enable_thinking = false -%}"

_USER: Message = {"role": "user", "content": "1 + 1?"}
_MORE: tuple[Message, ...] = ({"role": "assistant", "content": "2"}, _USER)
_PROBES: tuple[tuple[Message, ...], ...] = ((_USER,), (_USER, *_MORE))
_SYSTEM: Message = {"role": "system", "content": "Be short."}


def servable_template(renderer: Renderer) -> str:
    """The chat template with `{% if true %}` for `{% generation %}`, and with thinking turned off where that is needed.

    With `add_generation_prompt` alone, as servers render, it gives the prompts of training; that is checked, with and
    without a system message. Raises `ExportError` where it does not.
    """
    bare = _GENERATION.sub(lambda mark: f"{mark[1]}{'endif' if mark[2] else 'if true'}{mark[3]}", renderer.template)
    for template in (bare, _NO_THINKING + bare):
        if all(_same(renderer, template, probe) for probe in _PROBES):
            return template
    raise ExportError(
        expected="a chat template that, with add_generation_prompt, writes the prompts of training",
        found="another text before the answer",
        fix="export --to merged, and write prompts as `ift predict` does; or train with a template that has one prompt",
    )


def _same(renderer: Renderer, template: str, probe: Sequence[Message]) -> bool:
    (trained,) = renderer.aligned([probe])
    if _render(renderer, template, probe) != trained.text:
        return False
    try:
        (with_system,) = renderer.aligned([[_SYSTEM, *probe]])
    except DataError:  # it takes no system message, here as in training
        return True
    return _render(renderer, template, [_SYSTEM, *probe]) == with_system.text


def _render(renderer: Renderer, template: str, messages: Sequence[Message]) -> str:
    try:
        texts, _ = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            add_generation_prompt=True,
            **renderer.tokenizer.special_tokens_map,
        )
    except jinja2.TemplateError as error:
        raise ExportError(
            expected="a chat template that renders", found=str(error), fix="correct the base's chat template"
        ) from error
    return str(texts[0])
