"""Forgetting: what an adapter does to the base's loss on general text that has nothing to do with its task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ift_peft.data.lines import text_lines
from ift_peft.data.render import IGNORE, Rendered
from ift_peft.data.rows import raise_faults
from ift_peft.data.sources import read_source
from ift_peft.errors import DataError, IftPeftError
from ift_peft.evaluate.compare import Predictions
from ift_peft.evaluate.intervals import Floats
from ift_peft.evaluate.metrics import Resampling, language_change, language_metrics, to_json
from ift_peft.infer.batches import Progress
from ift_peft.infer.likelihood import answer_likelihoods
from ift_peft.model.configuration import positions
from ift_peft.recipe import recipes_root
from ift_peft.sections import Evaluation

MOST_TEXTS = 64
MOST_TOKENS = 256  # of one text
BATCH_TOKENS = 2048  # all of them are scored, so that their logits are what fills the memory


def general_texts(section: Evaluation) -> list[str]:
    """The texts that a recipe measures forgetting on, at most 64, drawn with `seed`; none where it does not.

    Raises `DataError` for a file without any, or `Faults` naming each row that has none.
    """
    if not section.forgetting:
        return []
    path = recipes_root() / "data" / "general" / "text.txt"
    if section.general_text is not None:
        path = Path(section.general_text)
    is_text = path.suffix.lower() == ".txt"
    texts = text_lines(path, setting="evaluation.general_text") if is_text else _rows(path)
    if not texts:
        raise DataError(
            expected="evaluation.general_text to hold texts", found=f"none in {path}", fix="write one on each line"
        )
    if len(texts) > MOST_TEXTS:
        chosen = sorted(random.Random(section.seed).sample(range(len(texts)), MOST_TEXTS))
        texts = [texts[number] for number in chosen]
    return texts


def _rows(path: Path) -> list[str]:
    faults: list[IftPeftError] = []
    records = read_source(str(path), faults)
    texts = []
    for record in records:
        text = record.values.get("text")
        if isinstance(text, str) and text.strip():
            texts.append(text.strip())
        else:
            faults.append(
                DataError(
                    expected="general text in the column text", found=f"none at {record.where}", fix="add or remove it"
                )
            )
    raise_faults(faults)
    return texts


def windows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_positions: int | None) -> list[Rendered]:
    """Each text by itself, as it stands, without a chat template: the first of its tokens, all but one supervised.

    Texts are not packed into one another, so that each is one draw of the bootstrap. Those of one token are left out,
    as nothing in them is predicted.
    """
    longest = min(MOST_TOKENS, max_positions or MOST_TOKENS)
    encoded = [tokenizer(text, verbose=False)["input_ids"][:longest] for text in texts]
    return [Rendered(ids, [IGNORE, *ids[1:]]) for ids in encoded if len(ids) > 1]


def general_losses(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, progress: Progress | None = None
) -> Predictions:
    """The log-probability of each text to a model as it is, and the number of tokens that are predicted in it."""
    most = positions(model.config)
    rendered = windows(texts, tokenizer, max_positions=most)
    if not rendered:
        raise DataError(expected="general text of two tokens or more", found="none", fix="write whole sentences")
    likelihoods = answer_likelihoods(
        model,
        rendered,
        batch_size=max(1, BATCH_TOKENS // max(len(row.input_ids) for row in rendered)),
        pad_token_id=tokenizer.pad_token_id,
        progress=progress,
    )
    return Predictions(
        log_probabilities=np.array([one.log_probability for one in likelihoods]),
        tokens=np.array([one.tokens for one in likelihoods], dtype=np.float64),
    )


def forgetting_scores(
    section: Evaluation, base: Predictions, adapter: Predictions, resampling: Resampling
) -> dict[str, Any]:
    """Nats per token of base and adapter, and the change, paired: the same resampled texts for both."""
    before, after, tokens = _numbers(base), _numbers(adapter), base.tokens
    assert tokens is not None
    parts = {
        "base": language_metrics(before, tokens, resampling),
        "adapter": language_metrics(after, tokens, resampling),
        "change": language_change(before, after, tokens, resampling),
    }
    return {
        "text": "built in" if section.general_text is None else Path(section.general_text).name,
        "texts": len(tokens),
        "tokens": int(tokens.sum()),
        **{name: to_json({"loss": part["loss"]}) for name, part in parts.items()},
    }


def _numbers(predictions: Predictions) -> Floats:
    assert predictions.log_probabilities is not None
    return predictions.log_probabilities
