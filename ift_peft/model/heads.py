"""Heads of classifiers: what they are made with, and whether a base's own fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ift_peft.errors import ModelError
from ift_peft.model.configuration import read_config
from ift_peft.model.precision import widen
from ift_peft.model.tokenizer import BaseLocation

# Names of what transformers puts on top of a base to make a classifier of it.
HEAD_NAMES = (
    "score",
    "classifier",
    "pre_classifier",
    "classification_head",
    "pooler",
    "sequence_summary",
    "logits_proj",
)


@dataclass(frozen=True)
class ClassHead:
    """What a classifier's head is made with: its classes, the token that pads texts, and the seed of its weights."""

    classes: tuple[str, ...]
    pad_token_id: int
    seed: int

    def settings(self) -> dict[str, Any]:
        """As transformers' configurations have it."""
        return {
            "num_labels": len(self.classes),
            "id2label": dict(enumerate(self.classes)),
            "label2id": {name: number for number, name in enumerate(self.classes)},
            "pad_token_id": self.pad_token_id,
        }


def check_classes(location: BaseLocation, head: ClassHead) -> None:
    """Raise where the base brings a head for other classes, or for the same in another order."""
    config = read_config(location)
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return
    own = tuple(config.id2label[number] for number in sorted(config.id2label))
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(own))
    if len(own) != len(head.classes) or (not unnamed and own != head.classes):
        raise ModelError(
            expected=f"the classes of the base's own head in data.labels: {', '.join(own)}",
            found=", ".join(head.classes),
            fix="set data.labels to them, in order (a mapping renames stored values), or give a base without a head",
        )


def widen_head(model: PreTrainedModel) -> None:
    """Make what stands on top of a base float32, as PEFT makes adapters: it is trained, and steps are small."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in HEAD_NAMES and any(True for _ in module.parameters()):
            widen(module)
