from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ift_peft.data.rows import to_saved
from ift_peft.errors import DataError, RunError
from ift_peft.explain.explanation import explain, with_training_rows
from ift_peft.explain.influence import TrainingRows, influence, training_rows
from ift_peft.explain.score import answer_loss
from ift_peft.infer.load import Parts, open_parts
from ift_peft.reporter import Silent
from ift_peft.run_dir import open_run
from tests.explain.conftest import QUERY, cued_rows, write_rows

pytestmark = pytest.mark.slow


def test_a_copy_of_the_query_helped_most_and_a_mislabelled_copy_opposed(model: Any, parts: Parts) -> None:
    training = training_rows(parts, model, sample=1000, seed=0)
    assert (len(training.rows), training.total) == (320, 320)
    one = explain(model, parts, QUERY, method="occlusion")
    assert one.answer == "正面"
    (one,) = with_training_rows(model, parts, [one], training, rows=5, reporter=Silent())
    found = one.influence
    assert found is not None
    assert found.helping[0].row.key == "train.jsonl:7"
    assert found.helping[0].similarity == pytest.approx(1.0, abs=1e-3)
    assert "train.jsonl:12" in [pull.row.key for pull in found.opposing]
    assert [pull.similarity for pull in found.helping] == sorted((p.similarity for p in found.helping), reverse=True)
    assert [pull.similarity for pull in found.opposing] == sorted(p.similarity for p in found.opposing)


def test_similarity_is_the_cosine_of_the_gradients_of_all_adapter_weights(model: Any, parts: Parts) -> None:
    drawn = training_rows(parts, model, sample=3, seed=1)
    query, other = drawn.rendered[0], drawn.rendered[1]
    needed = [weight.requires_grad for weight in model.parameters()]
    loss = partial(answer_loss, pad_token_id=parts.tokenizer.pad_token_id)
    one = TrainingRows(drawn.rows[1:2], [other], 1)
    (found,) = influence(model, [query], one, loss, rows=1, reporter=Silent())
    assert [weight.requires_grad for weight in model.parameters()] == needed
    weights = [weight for name, weight in model.named_parameters() if "lora_" in name]
    assert found.weights == sum(weight.numel() for weight in weights) == 367_616
    gradients = []
    for row in (query, other):
        for weight in weights:
            weight.requires_grad_(True).grad = None
        model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights]).double())
    for weight in weights:
        weight.requires_grad_(False).grad = None
    (pull,) = found.helping or found.opposing
    assert pull.similarity == pytest.approx(float(torch.cosine_similarity(*gradients, dim=0)), abs=1e-4)


def test_fewer_rows_are_part_of_more(model: Any, parts: Parts) -> None:
    few, many, others = (training_rows(parts, model, sample=n, seed=s).rows for n, s in ((10, 0), (40, 0), (40, 1)))
    assert few == many[:10]
    assert len({row.where for row in many}) == 40
    assert {row.where for row in many} != {row.where for row in others}


def with_rows(parts: Parts, path: Path) -> Parts:
    data = parts.recipe.data.model_copy(update={"train": str(path)})
    return replace(parts, recipe=parts.recipe.model_copy(update={"data": data}))


def test_rows_that_are_not_those_of_training_are_refused(model: Any, parts: Parts, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_rows(path, cued_rows(320, seed=5))
    with pytest.raises(RunError, match="another first row"):
        training_rows(with_rows(parts, path), model, sample=5, seed=0)
    same = Path(parts.recipe.data.train or "").read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(same[:-1]), "utf-8")
    with pytest.raises(RunError, match="319 rows where there were 320"):
        training_rows(with_rows(parts, path), model, sample=5, seed=0)
    with pytest.raises(DataError):
        training_rows(with_rows(parts, tmp_path / "none.jsonl"), model, sample=5, seed=0)


def test_rows_that_the_run_kept_are_taken_from_there(model: Any, parts: Parts, tmp_path: Path) -> None:
    whole = training_rows(parts, model, sample=1000, seed=0)
    copy = tmp_path / "runs" / "sentiment" / "copy"
    shutil.copytree(parts.run.path, copy)
    run = open_run(copy)
    ordered = sorted(whole.rows, key=lambda row: int(row.key.rpartition(":")[2]))
    odd = replace(ordered[3], where="kept.jsonl:1\u2028", text="line\u2028separator")
    run.write_lines("train.jsonl", [to_saved(row) for row in (*ordered[:3], odd, *ordered[4:])])
    found = training_rows(with_rows(open_parts(run), tmp_path / "gone.jsonl"), model, sample=1000, seed=0)
    assert found.total == 320
    assert odd in found.rows
