"""What a run is made of, by hash, and the rows and facts of it that its folder keeps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ift_peft.data.fit import Fitted
from ift_peft.data.render import Rendered
from ift_peft.data.rows import to_saved
from ift_peft.recipe import Recipe
from ift_peft.run_dir import RunDir
from ift_peft.train.losses import find_teacher
from ift_peft.train.prepare import Prepared


def inputs_of(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """Base, template, rows and teacher of a run by hash: with equal seeds, equal ones make equal adapters.

    Raises `ModelError` for a teacher that cannot be used.
    """
    teacher = find_teacher(recipe.loss, prepared.tokenizer, max_length=prepared.max_length)
    found = {
        "base_fingerprint": prepared.location.fingerprint(),
        "template_sha256": prepared.renderer.template_hash,
        "train_sha256": prepared.train.facts["sha256"],
        "test_sha256": _hash(prepared.test.rendered),
    }
    if prepared.validation is not None:
        found["validation_sha256"] = _hash(prepared.validation.rendered)
    if teacher is not None:
        found["teacher_fingerprint"] = teacher.fingerprint()
    return found


def _hash(rendered: Sequence[Rendered]) -> str:
    digest = hashlib.sha256()
    for row in rendered:
        digest.update(json.dumps([row.input_ids, row.labels]).encode())
    return digest.hexdigest()


def record_inputs(run: RunDir, prepared: Prepared, hashes: dict[str, Any]) -> None:
    """Write the golden example, the rows held out and set aside, and the facts of the inputs into the run."""
    train = prepared.train.facts
    renderer, location = prepared.renderer, prepared.location
    template = {"template_sha256": renderer.template_hash, "template": renderer.template}
    run.write("golden.json", {**train["golden"], **template})
    run.write_lines("test.jsonl", [to_saved(row) for row in prepared.test.rows])
    if prepared.checked is not None:
        run.write("findings.json", {"findings": [found.to_json() for found in prepared.checked.findings]})
        run.write_lines("dropped.jsonl", [row.to_json() for row in prepared.checked.cleaned.dropped])
        run.write_lines("train.jsonl", [to_saved(row) for row in prepared.checked.cleaned.rows])
    counts = ("rows", "variants", "tokens", "supervised_tokens", "truncated", "dropped")
    rows = {"train": {name: train[name] for name in counts} | {"tokenised_before": prepared.train.reused}}
    rows["test"] = _counts(prepared.test)
    if prepared.validation is not None:
        run.write_lines("validation.jsonl", [to_saved(row) for row in prepared.validation.rows])
        rows["validation"] = _counts(prepared.validation)
    run.update_manifest(
        inputs=hashes,
        base={
            "name": location.public_name,
            "revision": location.revision,
            "files": location.files(),
            "config": location.config(),
        },
        template=prepared.renderer.origin,
        generation_prompt=prepared.renderer.generation_prompt,
        max_length=prepared.max_length,
        rows=rows,
    )


def _counts(fitted: Fitted) -> dict[str, int]:
    return {
        "rows": len(fitted.rows),
        "tokens": fitted.tokens,
        "supervised_tokens": fitted.supervised_tokens,
        "truncated": fitted.fit.truncated,
        "dropped": fitted.fit.dropped,
    }
