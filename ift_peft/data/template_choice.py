"""Which chat template conversations are rendered with: the tokenizer's, TRL's marked version of it, or one of ours."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from ift_peft.data.template import SECONDS, try_template, within
from ift_peft.errors import ModelError, OutOfMemory

# For tokenizers that come without a template. The answer's leading space belongs to the answer, so that tokenizers
# which join a space to the word after it split the same way with and without the answer.
FALLBACK_TEMPLATE = (
    "{%- if bos_token is defined and bos_token -%}{{ bos_token }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- 'Assistant:' -}}{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}"
    "{{- '\\n' -}}"
    "{%- elif message['role'] == 'system' -%}"
    "{{- message['content'] + '\\n' -}}"
    "{%- else -%}"
    "{{- 'User: ' + message['content'] + '\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
)


def choose_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The template, and in words where it came from.

    Raises `ModelError` for one that cannot be tried, and where there is neither one nor an end-of-sequence token.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()))
    if not template:
        if tokenizer.eos_token is None:
            raise ModelError(
                expected="a chat template or an end-of-sequence token",
                found="a tokenizer with neither",
                fix="set eos_token in tokenizer_config.json",
            )
        return FALLBACK_TEMPLATE, "fallback (the tokenizer has no chat template)"
    named = tokenizer.special_tokens_map
    try_template(str(template), tuple((name, str(token)) for name, token in named.items()))
    if has_generation_markers(template):
        return str(template), "the tokenizer's, with generation markers"
    try:
        with within(SECONDS):
            known = get_training_chat_template(tokenizer)
    except OutOfMemory:
        raise
    except Exception:  # TRL knows no marked version of it, or it fails where TRL renders it, and will again
        known = None
    if known is not None:
        return known, "TRL's marked version of the tokenizer's"
    return str(template), "the tokenizer's, without generation markers"
