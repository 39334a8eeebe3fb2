"""The model card that travels with an adapter."""

from __future__ import annotations

from typing import Any

from ift_peft.adapter_methods import NAMES, article
from ift_peft.data.instructions import Asker
from ift_peft.recipe import Recipe
from ift_peft.sections import Data

_CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: {pipeline}
tags: [{tag}, ift_peft]
---

# {name}

{description}

{article} {method} adapter for `{base}`, {origin}.

## Measured on {test_rows:,} held-out rows

| | base | adapter | change |
|---|---|---|---|
{table}

{intervals}. Change is adapter minus base on the same resampled rows.

{safety}## Use

```python
from peft import PeftModel
from transformers import {kind}, AutoTokenizer

model = PeftModel.from_pretrained({kind}.from_pretrained(base{classes}), folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

{packed}{asked}
## Limits

It was measured on the rows above and on nothing else. Other domains, languages and phrasings may score lower.
"""

_PACKED = """It was trained over {quantization} weights, and over others it answers otherwise: load the base with a
`quantization_config` that packs it so, as the card that `ift export --to peft` writes has it.

"""


def adapter_card(recipe: Recipe, *, base: str, scores: dict[str, Any], rows: int, combined: str | None = None) -> str:
    """The text of README.md: what it is, what it scored, how it is asked. Holds no path of the machine.

    `combined` says what an adapter that was not trained itself was made of.
    """
    data = recipe.data
    if data.mixed:
        parts = (part for part, _ in data.by_source())
        asked = "".join(_asked(part, f"Texts of {name}") for name, part in zip(data.source_names, parts, strict=True))
    else:
        asked = _asked(data.for_new_texts[0], "Texts")
    quantization = "unquantised" if recipe.base.quantization == "none" else recipe.base.quantization
    trained = f"trained on {rows:,} rows over {quantization} weights with TRL's `SFTTrainer` through PEFT"
    classifier = recipe.base.head == "sequence-classification"
    return _CARD.format(
        pipeline="text-classification" if classifier else "text-generation",
        kind="AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM",
        classes=f", num_labels={len(data.label_words)}" if classifier else "",
        base=base,
        tag=recipe.adapter.method,
        method=NAMES[recipe.adapter.method],
        article=article(recipe.adapter.method),
        name=recipe.name,
        description=recipe.description,
        origin=combined or trained,
        test_rows=scores["rows"],
        table="\n".join(score_rows(scores)),
        intervals=scores["intervals"],
        safety=safety_part(scores),
        packed="" if recipe.base.quantization == "none" else _PACKED.format(quantization=recipe.base.quantization),
        asked=asked,
    )


def _asked(data: Data, texts: str) -> str:
    """How the rows of one section were asked; empty where they bring their questions along."""
    asker = Asker(data)
    if data.instruction is None and asker.section is None:
        return ""
    labels = f"The answer is one of: {', '.join(data.label_words)}." if data.labels else ""
    few = sorted({asker.first_instruction(text) or "" for text in ("中文", "English") if asker.suits(text)})
    shown = "\n".join(f"    {line}" for one in few for line in asker.prompt("…", one)[-1]["content"].splitlines())
    several = "in several phrasings, for example\n" if asker.section is not None else "as"
    return f"{texts} were asked about {several}\n\n{shown}\n\n{labels}\n\n".replace("\n\n\n", "\n\n")


def safety_part(scores: dict[str, Any]) -> str:
    """The section on refusals, empty where they were not measured."""
    if "safety" not in scores:
        return ""
    lines = [
        f"Refused of {part['rows']} {of} prompts ({part['source']}): base {part['base']['refusals']['value']:.3f}, "
        f"adapter {_spelled(part['adapter']['refusals'])}."
        for of, part in ((of, scores["safety"][of]) for of in ("harmful", "harmless"))
    ]
    told = "Told by the first words of greedy answers to prompts asked bare: no judgement of what was answered."
    return "\n".join(["## Safety", "", *lines, told, "", ""])


def score_rows(scores: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table: metric, base, adapter, change; in a mix, also those of each source."""
    lines = []
    whole = {"": scores, **{f"{name}: ": own for name, own in scores.get("by_source", {}).items()}}
    for source, own in whole.items():
        for name in own["adapter"]:
            cells = [_spelled(part) if (part := own[who].get(name)) else "" for who in ("base", "adapter", "change")]
            lines.append(f"| {source}{name} | {' | '.join(cells)} |")
    return lines


def _spelled(part: dict[str, float]) -> str:
    return f"{part['value']:.3f} ({part['low']:.3f} to {part['high']:.3f})"
