"""The model card that travels with an adapter."""

from __future__ import annotations

from typing import Any

from ift_peft.data.instructions import Asker
from ift_peft.recipe import Recipe

_CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: {pipeline}
tags: [lora, ift_peft]
---

# {name}

{description}

A LoRA adapter for `{base}`, trained on {rows:,} rows over {quantization} weights with TRL's `SFTTrainer` through PEFT.

## Measured on {test_rows:,} held-out rows

| | base | adapter | change |
|---|---|---|---|
{table}

{intervals}. Change is adapter minus base on the same resampled rows.

## Use

```python
from peft import PeftModel
from transformers import {kind}, AutoTokenizer

model = PeftModel.from_pretrained({kind}.from_pretrained(base{classes}), folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

{asked}
## Limits

It was measured on the rows above and on nothing else. Other domains, languages and phrasings may score lower.
"""


def adapter_card(recipe: Recipe, *, base: str, scores: dict[str, Any], rows: int) -> str:
    """The text of README.md: what it is, what it scored, how it is asked. Holds no path of the machine."""
    data = recipe.data
    asked = ""
    labels = f" The answer is one of: {', '.join(data.label_words)}." if data.labels else ""
    asker = Asker(data.for_new_texts[0])
    if asker.data.instruction is not None or asker.section is not None:
        few = sorted({asker.first_instruction(text) or "" for text in ("中文", "English") if asker.suits(text)})
        shown = "\n".join(f"    {line}" for one in few for line in asker.prompt("…", one)[-1]["content"].splitlines())
        several = "in several phrasings, for example\n" if asker.section is not None else "as"
        asked = f"Texts were asked about {several}\n\n{shown}\n\n{labels.strip()}\n\n".replace("\n\n\n", "\n\n")
    quantization = "unquantised" if recipe.base.quantization == "none" else recipe.base.quantization
    classifier = recipe.base.head == "sequence-classification"
    return _CARD.format(
        pipeline="text-classification" if classifier else "text-generation",
        kind="AutoModelForSequenceClassification" if classifier else "AutoModelForCausalLM",
        classes=f", num_labels={len(data.label_words)}" if classifier else "",
        base=base,
        name=recipe.name,
        description=recipe.description,
        rows=rows,
        quantization=quantization,
        test_rows=scores["rows"],
        table="\n".join(score_rows(scores)),
        intervals=scores["intervals"],
        asked=asked,
    )


def score_rows(scores: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table: metric, base, adapter, change."""
    lines = []
    for name in scores["adapter"]:
        cells = [
            f"{part['value']:.3f} ({part['low']:.3f} to {part['high']:.3f})" if (part := scores[who].get(name)) else ""
            for who in ("base", "adapter", "change")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
