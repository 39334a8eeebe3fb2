"""What a base's configuration says, without its weights: how many tokens it takes, and which modules it has."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from ift_peft.errors import ModelError, first_line
from ift_peft.model.quiet import quiet
from ift_peft.model.tokenizer import BaseLocation
from ift_peft.sections import Head

# Model types whose position embeddings begin after `pad_token_id` (create_position_ids_from_input_ids).
COUNTED_FROM_PADDING = frozenset(
    {
        "camembert",
        "data2vec-text",
        "ibert",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)


def read_config(location: BaseLocation, **settings: Any) -> Any:
    """The base's configuration, with `settings` in the place of its own. Raises `ModelError`; runs none of its code."""
    try:
        with quiet():
            return AutoConfig.from_pretrained(
                location.folder, trust_remote_code=False, local_files_only=True, **settings
            )
    except Exception as error:  # what stands in the file is for any class of transformers to fail on
        raise ModelError(
            expected=f"the configuration of a base in {location.folder}",
            found=f"{first_line(error):.300}",
            fix="choose a base that the installed transformers knows without code of its own",
        ) from error


def positions(config: Any) -> int | None:
    """How many tokens a base can take, None where nothing limits them.

    Bases like RoBERTa count positions from after the number of their padding token, so that their table is longer.
    """
    config = config.get_text_config()  # of a base that also sees or hears, the part that reads
    table = getattr(config, "max_position_embeddings", None)
    if not table or table < 0:
        return None
    return int(table) - (int(config.pad_token_id) + 1 if config.model_type in COUNTED_FROM_PADDING else 0)


def skeleton(
    location: BaseLocation, head: Head = "causal-lm", *, settings: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The base's modules without weights (on the meta device): enough to check what an adapter would match.

    `settings` replace those of its configuration, as those of a `ClassHead`.
    """
    kind = AutoModelForCausalLM if head == "causal-lm" else AutoModelForSequenceClassification
    with quiet():
        try:
            config = read_config(location, **(settings or {}))
            with torch.device("meta"):
                return kind.from_config(config, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                expected=f"the config of a base for {head} in {location.folder}",
                found=first_line(error),
                fix=f"choose a base that transformers' {kind.__name__} knows",
            ) from error
