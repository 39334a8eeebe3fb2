"""An adapter merged into its base, and the proof, after reloading from disk, that nothing changed on the way."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ift_peft.data.fit import Fitted
from ift_peft.data.render import Rendered
from ift_peft.data.row import Row
from ift_peft.errors import MergeError
from ift_peft.evaluate.compare import predict_rows
from ift_peft.infer.batches import pad
from ift_peft.infer.classes import class_logits
from ift_peft.infer.likelihood import supervised_logits
from ift_peft.infer.load import Parts, held_out_rows, load_model
from ift_peft.model.base import DTYPES, choose_device, quiet
from ift_peft.reporter import Reporter
from ift_peft.run_dir import write_atomically
from ift_peft.sections import Quantization

BOUND = {"float32": 1e-3, "bfloat16": 1.0, "float16": 0.1}  # largest logit difference allowed after rounding to a type
_BATCH = 16


@dataclass(frozen=True)
class MergeResult:
    """Where the merged model is, and how it compares on the run's held-out rows with the adapter it came from.

    `max_logit_difference` and `same_labels` are against the adapter on the base that it was merged into, unquantised;
    `same_labels_as_run` against the predictions made in training, over the quantised base.
    """

    folder: Path
    dtype: str
    rows: int
    max_logit_difference: float
    same_labels: int | None
    same_labels_as_run: int | None


def merge(parts: Parts, *, output: Path, dtype: str, reporter: Reporter) -> MergeResult:
    """Merge the run's adapter into the unquantised base and write it to `output`, whole or not at all.

    An adapter that makes up for what quantisation took, as loftq's, is merged into the quantised base, unpacked: into
    the unquantised one it would bring that a second time.

    Raises `MergeError` where `output` exists, where the merged model's logits on the held-out rows differ by more than
    the bound of `dtype` from those of the adapter, or where a label changes at float32.
    """
    if output.exists():
        raise MergeError(expected=f"no {output} yet", found="it exists", fix="remove it, or give another --output")
    held_out = held_out_rows(parts)
    quantization = _of_base(parts)
    model, _ = load_model(parts, quantization=quantization, compute_dtype="float32", unpack=True)
    reporter.stage("measuring adapter on unquantised base", 1)
    expected = _last_logits(model, parts, held_out.rendered)
    labels = _label_numbers(model, parts, held_out.rows)
    reporter.finish()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.{secrets.token_hex(4)}"
    try:
        with quiet():
            if parts.recipe.adapter.embeddings or parts.recipe.adapter.modules_to_save:
                _untie(model)
            merged = model.merge_and_unload(safe_merge=True)
            merged.to(DTYPES[dtype])
            merged.config.dtype = DTYPES[dtype]
            merged.save_pretrained(partial)
        _save_tokenizer(parts, partial)
        del model, merged
        reporter.stage("measuring merged model, reloaded", 1)
        result = _verify(parts, partial, output, dtype, held_out, expected, labels)
        reporter.finish()
        _describe(parts, partial, result)
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors writes 0600
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return result


def _of_base(parts: Parts) -> Quantization:
    """How the base is quantised that the adapter is merged into."""
    return parts.recipe.base.quantization if parts.recipe.adapter.method == "loftq" else "none"


def _untie(model: Any) -> None:
    """Give the head weights of its own where it shares them with an embedding, and the adapter changes one of them."""
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or not base.config.tie_word_embeddings:
        return
    if not any(isinstance(one, BaseTunerLayer | ModulesToSaveWrapper) for one in (head, embedding)):
        return
    if not isinstance(head, ModulesToSaveWrapper):  # whose trained copy is its own already
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    base.config.tie_word_embeddings = False


def _save_tokenizer(parts: Parts, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(parts.run.adapter, trust_remote_code=False, local_files_only=True)
    tokenizer.save_pretrained(folder)


def _verify(
    parts: Parts,
    partial: Path,
    output: Path,
    dtype: str,
    held_out: Fitted,
    expected: list[torch.Tensor],
    labels: list[int] | None,
) -> MergeResult:
    with quiet():
        kind = AutoModelForCausalLM if parts.recipe.base.head == "causal-lm" else AutoModelForSequenceClassification
        reloaded = kind.from_pretrained(
            partial, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True
        ).to(choose_device(parts.recipe.base.device))
    found = _last_logits(reloaded, parts, held_out.rendered)
    difference = float(torch.stack([(a - b).abs().max() for a, b in zip(expected, found, strict=True)]).max())
    relabelled = _label_numbers(reloaded, parts, held_out.rows)
    same = _agreement(labels, relabelled)
    if not difference <= BOUND[dtype]:
        raise MergeError(
            expected=f"logits within {BOUND[dtype]:g} of the adapter's after reloading the merged {dtype} model",
            found=f"a difference of {difference:.3g} on {len(held_out.rows)} held-out rows",
            fix="merge with --dtype float32; nothing was written",
        )
    if dtype == "float32" and same is not None and same < len(held_out.rows):
        raise MergeError(
            expected="the same label on every held-out row",
            found=f"{len(held_out.rows) - same} changed",
            fix="nothing was written; is the base deterministic on this device?",
        )
    in_run = _labels_of_run(parts)
    return MergeResult(output, dtype, len(held_out.rows), difference, same, _agreement(in_run, relabelled))


def _agreement(one: list[int] | None, other: list[int] | None) -> int | None:
    return None if one is None or other is None else sum(a == b for a, b in zip(one, other, strict=True))


def _labels_of_run(parts: Parts) -> list[int] | None:
    if not parts.labels:
        return None
    lines = (parts.run.path / "predictions.jsonl").read_text("utf-8").splitlines()
    chosen = []
    for line in lines:
        probabilities = json.loads(line)["adapter"]
        chosen.append(parts.labels.index(max(parts.labels, key=lambda label: probabilities[label])))
    return chosen


def _label_numbers(model: Any, parts: Parts, rows: Sequence[Row]) -> list[int] | None:
    if not parts.labels:
        return None
    return predict_rows(model, parts.renderer, rows, parts.labels, batch_size=_BATCH, adapter=True).chosen


@torch.no_grad()
def _last_logits(model: Any, parts: Parts, rendered: Sequence[Rendered]) -> list[torch.Tensor]:
    """Float32 logits of shape (supervised tokens, vocabulary), or (rows, classes), for each batch of rows, on CPU."""
    logits_of = supervised_logits if parts.recipe.base.head == "causal-lm" else class_logits
    model.eval()
    device = next(model.parameters()).device
    collected = []
    for start in range(0, len(rendered), _BATCH):
        batch = pad(rendered[start : start + _BATCH], parts.tokenizer.pad_token_id)
        logits = logits_of(model, {name: tensor.to(device) for name, tensor in batch.items()})[0]
        collected.append(logits.float().cpu())
    return collected


def _describe(parts: Parts, folder: Path, result: MergeResult) -> None:
    card = (parts.run.adapter / "README.md").read_text("utf-8").split("\n## Use", 1)[0]
    card = card.replace("library_name: peft", "library_name: transformers")
    card = re.sub(r"^(An?) (\S+ adapter) for", lambda of: f"A merge of {of[1].lower()} {of[2]} into", card, flags=re.M)
    quantization = _of_base(parts)
    base = "unquantised base" if quantization == "none" else f"{quantization} base, unpacked,"
    write_atomically(
        folder / "README.md",
        f"{card}\n## Merge\n\nMerged into the {base} as {result.dtype}. On {result.rows} held-out rows, "
        f"reloaded from disk, its logits differ from the adapter's by at most {result.max_logit_difference:.2e}.\n",
    )
