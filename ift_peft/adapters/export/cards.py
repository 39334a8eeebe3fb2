"""What is written beside exported weights for those who get them: cards, and the command that starts a server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from ift_peft.adapters.export.gguf_file import About
from ift_peft.infer.load import Parts, class_head
from ift_peft.model.heads import HEAD_NAMES
from ift_peft.model.tokenizer import TINY

_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
# Ranks that vLLM's --max-lora-rank takes (vllm/config/lora.py).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

LOFTQ = "loftq, which makes up for what quantisation took, and fits no other weights than the dequantised ones"


def about(parts: Parts) -> About:
    """The run in words that may be handed out."""
    return About(
        name=parts.recipe.name,
        description=parts.recipe.description,
        base=parts.location.public_name,
        revision=parts.location.revision,
        licence=licence(parts.location.folder),
        finetune=parts.recipe.name,
    )


def licence(base: Path) -> str | None:
    """What the base's own card says its licence is; None where it has none."""
    front = _FRONT.match((base / "README.md").read_text("utf-8")) if (base / "README.md").is_file() else None
    value = (yaml.safe_load(front[1]) or {}).get("license") if front else None
    return value if isinstance(value, str) else None


def on_the_hub(parts: Parts) -> bool:
    """Whether others can get the base by its name."""
    return parts.location.folder != TINY and not Path(parts.recipe.base.model).expanduser().is_dir()


def card(parts: Parts, *sections: str, library: str | None = None) -> str:
    """The run's model card up to how it is used, with the licence, and these sections instead."""
    text = (parts.run.adapter / "README.md").read_text("utf-8")
    body, _, rest = text.partition("\n## Use")
    asked = rest.partition("```\n\n")[2].partition("\n## Limits")[0].strip()
    found = licence(parts.location.folder)
    if found:
        body = body.replace("---\nbase_model:", f"---\nlicense: {found}\nbase_model:", 1)
    if library:
        body = body.replace("library_name: peft", f"library_name: {library}", 1)
    questions = f"## How it was asked\n\n{asked}" if asked else ""
    limits = f"## Limits\n\n{rest.partition('## Limits')[2].strip()}"
    return "\n\n".join(part.strip() for part in (body, *sections, questions, _base(parts), limits) if part) + "\n"


def _base(parts: Parts) -> str:
    location = parts.location
    name = f"`{location.public_name}`" + (f", revision `{location.revision}`" if location.revision else "")
    if on_the_hub(parts):
        where = f"{name} of the Hugging Face Hub."
    elif location.folder == TINY:
        where = (
            f"{name}, which comes with the package ift_peft; its folder is printed by\n\n"
            '    python -c "from ift_peft.model.tokenizer import TINY; print(TINY)"'
        )
    else:
        where = f"{name}, a model that is not on the Hub: ask for it where you got this."
    fingerprint = parts.run.read("manifest.json")["inputs"]["base_fingerprint"]
    return f"## Base\n\n{where}\n\nFingerprint: {fingerprint}"


def over_other_weights(parts: Parts) -> list[str]:
    """What to know before an adapter that was trained over quantised weights is run over the unquantised base."""
    quantization = parts.recipe.base.quantization
    if quantization == "none":
        return []
    return [
        f"It was trained over {quantization} weights; over the unquantised base it answers otherwise. `ift merge` "
        "measures by how much."
    ]


def peft_use(parts: Parts) -> str:
    """How stock PEFT loads the adapter, over the weights that it was trained over."""
    head = class_head(parts.recipe, parts.tokenizer)
    kind = "AutoModelForCausalLM" if head is None else "AutoModelForSequenceClassification"
    arguments = [f'revision="{parts.location.revision}"'] if parts.location.revision else []
    if head is not None:
        names = json.dumps(head.classes, ensure_ascii=False)
        arguments += [f"id2label=dict(enumerate({names}))", f"pad_token_id={head.pad_token_id}"]
    packing = _packing(parts)
    if packing:
        arguments += ["quantization_config=packing", f"dtype={_dtype(parts)}"]
    given = "".join(f", {argument}" for argument in arguments)
    base = json.dumps(parts.location.public_name)
    classes = f"{kind}, AutoTokenizer" + (", BitsAndBytesConfig" if packing else "")
    lines = [
        *(["import torch"] if packing else []),
        "from peft import PeftModel",
        f"from transformers import {classes}",
        "",
        'folder = "."  # of this file',
        f"base = {base}" + ("" if on_the_hub(parts) else "  # the folder of the base, see below"),
        *([f"packing = {packing}"] if packing else []),
        f"model = PeftModel.from_pretrained({kind}.from_pretrained(base{given}), folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    code = "\n".join(lines)
    return "\n\n".join(("## Use", f"```python\n{code}\n```", *over_other_weights(parts)))


def _packing(parts: Parts) -> str | None:
    """The quantisation that the adapter was trained over, as code; None where there was none."""
    section = parts.recipe.base
    if section.quantization == "none":
        return None
    settings = ["load_in_8bit=True"]
    if section.quantization != "int8":
        settings = [
            "load_in_4bit=True",
            f'bnb_4bit_quant_type="{section.quantization}"',
            f"bnb_4bit_use_double_quant={section.double_quantization}",
            f"bnb_4bit_compute_dtype={_dtype(parts)}",
        ]
    if section.head == "sequence-classification":
        settings.append(f"llm_int8_skip_modules={json.dumps(HEAD_NAMES)}")
    return f"BitsAndBytesConfig({', '.join(settings)})"


def _dtype(parts: Parts) -> str:
    """The type that the recipe names; float32 where it leaves it to the device."""
    named = parts.recipe.base.compute_dtype
    return f"torch.{'float32' if named == 'auto' else named}"


MERGED_USE = """## Use

```python
from transformers import pipeline

ask = pipeline("text-generation", ".")  # the folder of this file
print(ask([{"role": "user", "content": "…"}], do_sample=False)[0]["generated_text"][-1]["content"])
```"""


def llama_use(file: str, *, adapter: str | None = None) -> str:
    """How llama.cpp runs a model, or an adapter on one."""
    lora = f" --lora {adapter}" if adapter else ""
    return f"""## Use

    llama-cli --model {file}{lora} --jinja --temp 0
    llama-server --model {file}{lora} --jinja --temp 0

The chat template is in the model's file, for which `--jinja` is. It writes every special token that training saw, so
that none is added."""


def ollama_use(name: str, *, tasked: bool) -> str:
    """How Ollama gets and runs the model."""
    task = "\n\nThe instruction below is part of each message: Ollama adds none." if tasked else ""
    return f"""## Use

    ollama create {name} -f Modelfile
    ollama run {name}{task}"""


def vllm_rank(ranks: int) -> int | None:
    """The smallest rank that vLLM can be started with for this one; None where it is too large."""
    return next((rank for rank in VLLM_RANKS if rank >= ranks), None)


def vllm_command(parts: Parts, *, rank: int) -> str:
    """A shell script that serves base and adapter; of a base that is not on the Hub it is given the folder."""
    base = parts.location.public_name
    given = f'"{base}"' if on_the_hub(parts) else f'"${{1:?give the folder of the base {base}}}"'
    shift = "" if on_the_hub(parts) else "\nshift"
    revision = f" --revision {parts.location.revision}" if parts.location.revision else ""
    return f"""#!/bin/sh
# Serves the adapter as the model {parts.recipe.name}. Further options go on to vllm.
set -eu
adapter="$(cd "$(dirname "$0")" && pwd)/adapter"
base={given}{shift}
exec vllm serve "$base"{revision} --enable-lora --max-lora-rank {rank} \\
    --lora-modules {parts.recipe.name}="$adapter" \\
    --tokenizer "$adapter" --chat-template "$adapter/chat_template.jinja" "$@"
"""


def vllm_use(parts: Parts) -> str:
    """How vLLM is started and asked."""
    base = "" if on_the_hub(parts) else " FOLDER_OF_THE_BASE"
    use = f"""## Use

    sh serve.sh{base}

Ask for the model `{parts.recipe.name}` at the OpenAI API that it prints, with `temperature` 0."""
    return "\n\n".join((use, *over_other_weights(parts)))
