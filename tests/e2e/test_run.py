"""What a run leaves behind, and everything that is done with it afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ift_peft.adapters.merge import merge
from ift_peft.data.render import IGNORE, Renderer
from ift_peft.errors import Faults, MergeError, ModelError, RunError
from ift_peft.evaluate.run import evaluate_run
from ift_peft.infer.load import Question, held_out_rows, load_model, open_parts
from ift_peft.infer.predict import answer_all, generate
from ift_peft.model.base import load_base
from ift_peft.model.tokenizer import TINY, locate_base
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir, list_runs, open_run
from ift_peft.train.run import resume
from tests.conftest import Ift

pytestmark = pytest.mark.slow


def test_the_run_holds_everything_and_says_so(short_run: RunDir, printed: str) -> None:
    manifest, scores = short_run.read("manifest.json"), short_run.read("scores.json")
    assert manifest["status"] == "succeeded"
    assert manifest["steps"] == 10
    assert manifest["rows"]["train"]["rows"] == 160
    assert manifest["rows"]["train"]["supervised_tokens"] > 160
    assert set(manifest["inputs"]) == {"base_fingerprint", "template_sha256", "train_sha256", "test_sha256"}
    assert manifest["versions"]["trl"]
    for who in ("base", "adapter"):
        for name in ("accuracy", "precision", "recall", "f1"):
            part = scores[who][name]
            assert 0 <= part["low"] <= part["value"] <= part["high"] <= 1
        assert f"{scores[who]['accuracy']['value']:.3f}" in printed
    assert sum(map(sum, scores["confusion"]["adapter"])) == scores["rows"] == 60
    losses = [json.loads(line)["loss"] for line in (short_run.path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert all(np.isfinite(losses))
    assert "Warning" not in printed
    assert short_run.path.parent.joinpath("latest").resolve() == short_run.path
    assert [run.path for run in list_runs(short_run.path.parent.parent)] == [short_run.path]


def test_the_golden_example_supervises_its_answer(short_run: RunDir) -> None:
    golden = short_run.read("golden.json")
    tokenizer = AutoTokenizer.from_pretrained(short_run.adapter)
    answer = tokenizer.decode([label for label in golden["labels"] if label != IGNORE])
    assert answer == golden["messages"][-1]["content"] + "<|end|>"


def test_the_adapter_folder_is_pefts_and_leaks_no_path(short_run: RunDir) -> None:
    names = {path.name for path in short_run.adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt"))}
    for path in short_run.adapter.iterdir():
        assert path.stat().st_mode & 0o044, f"{path.name} is not readable by others"
        if path.suffix in (".json", ".md"):
            assert str(TINY.parent) not in path.read_text("utf-8")
            assert str(short_run.path.parent) not in path.read_text("utf-8")
    config = json.loads((short_run.adapter / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "tiny"


def test_stock_peft_opens_the_adapter_to_the_same_logits(short_run: RunDir) -> None:
    parts = open_parts(short_run)
    ours, _ = load_model(parts)
    base = load_base(locate_base("tiny"), quantization="nf4", device="cpu").model
    stock = PeftModel.from_pretrained(base, short_run.adapter).eval()
    tokens = torch.tensor([parts.run.read("golden.json")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, stock(tokens).logits)
        with stock.disable_adapter():
            assert not torch.allclose(ours(tokens).logits, stock(tokens).logits, atol=1e-3)


def test_measuring_again_gives_the_stored_scores(short_run: RunDir) -> None:
    stored, again = short_run.read("scores.json"), evaluate_run(short_run, data=None, reporter=Silent())
    assert again == stored


def test_other_rows_are_measured_through_the_runs_own_recipe(short_run: RunDir, tmp_path: Path) -> None:
    path = tmp_path / "more.jsonl"
    path.write_text('{"text": "很好，推荐", "label": 1}\n{"text": "差评，退货了", "label": "负面"}\n', "utf-8")
    assert evaluate_run(short_run, data=path, reporter=Silent())["rows"] == 2


def test_predictions_are_those_of_the_evaluation(short_run: RunDir) -> None:
    parts = open_parts(short_run)
    model, _ = load_model(parts)
    rows = held_out_rows(parts).rows
    answers = list(answer_all(model, parts, [Question(row.prompt) for row in rows], max_new_tokens=8))
    stored = [
        json.loads(line)["adapter"] for line in (short_run.path / "predictions.jsonl").read_text("utf-8").splitlines()
    ]
    for answer, probabilities in zip(answers, stored, strict=True):
        assert answer.probabilities == pytest.approx(probabilities, abs=1e-4)
        assert answer.text == max(probabilities, key=lambda label: probabilities[label])


def test_an_overlong_text_is_shortened_and_the_answer_says_so(short_run: RunDir) -> None:
    parts = open_parts(short_run)
    model, _ = load_model(parts)
    short, long = answer_all(model, parts, [parts.ask("好"), parts.ask("好吃" * 2000)], max_new_tokens=8)
    assert (short.truncated, long.truncated) == (False, True)


def test_generation_starts_from_the_training_prompt_and_stops_at_its_end_token(short_run: RunDir) -> None:
    parts = open_parts(short_run)
    model, _ = load_model(parts)
    pieces: list[str] = []
    text = generate(model, parts, parts.ask("很好").messages, max_new_tokens=6, on_text=pieces.append)
    assert "".join(pieces).strip() == text
    assert "<|" not in text


def test_merging_changes_nothing_and_stock_transformers_loads_it(short_run: RunDir, tmp_path: Path) -> None:
    parts = open_parts(short_run)
    result = merge(parts, output=tmp_path / "merged", dtype="float32", reporter=Silent())
    assert result.max_logit_difference < 1e-3
    assert result.same_labels == result.rows == 60
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    adapter, _ = load_model(parts)
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("今天很好", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapter(ids).logits, atol=1e-3)
        with adapter.disable_adapter():
            assert not torch.allclose(merged(ids).logits, adapter(ids).logits, atol=1e-2)
    base = load_base(locate_base("tiny"), device="cpu").model
    assert torch.equal(merged.get_output_embeddings().weight, base.get_output_embeddings().weight)
    assert not torch.equal(merged.get_input_embeddings().weight, base.get_input_embeddings().weight)
    for path in (tmp_path / "merged").glob("*.json"):
        assert str(TINY.parent) not in path.read_text("utf-8")
    with pytest.raises(MergeError, match="it exists"):
        merge(parts, output=tmp_path / "merged", dtype="float32", reporter=Silent())


def test_a_wrong_merge_is_caught_and_leaves_nothing(
    short_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaling dropped, the mistake of merging B·A alone."""
    from peft.tuners.lora.layer import Linear

    correct = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: correct(self, name) / self.scaling[name])
    with pytest.raises(MergeError, match="a difference of"):
        merge(open_parts(short_run), output=tmp_path / "merged", dtype="float32", reporter=Silent())
    assert not list(tmp_path.iterdir())


def test_a_run_is_refused_on_another_base_template_or_tokenizer(short_run: RunDir, tmp_path: Path) -> None:
    for name, key in (("manifest.json", "inputs"), ("golden.json", "input_ids")):
        copy = RunDir(tmp_path / name)
        shutil.copytree(short_run.path, copy.path)
        content = copy.read(name)
        if key == "inputs":
            content["inputs"]["base_fingerprint"] = "0" * 64
        else:
            content["input_ids"][3] += 1
            content["template_sha256"] = "0" * 64
        copy.write(name, content)
        with pytest.raises((RunError, Faults), match="as in training") as caught:
            open_parts(copy)
        if key == "input_ids":
            assert "chat template" in str(caught.value)
            assert "golden example" in str(caught.value)


def test_a_run_that_is_being_trained_is_not_resumed_beside_it(short_run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(short_run.path, copy.path)
    copy.update_manifest(status="running")
    with copy.locked(), pytest.raises(RunError, match="another process"):
        resume(copy, reporter=Silent())


def test_likelihoods_that_are_no_numbers_are_refused(short_run: RunDir) -> None:
    parts = open_parts(short_run)
    model, _ = load_model(parts)
    with torch.no_grad():
        next(model.parameters())[:] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinity"):
        list(answer_all(model, parts, [parts.ask("好")], max_new_tokens=8))


def test_an_unfinished_run_is_not_served_and_a_missing_one_is_named(short_run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(short_run.path, copy.path)
    copy.update_manifest(status="interrupted")
    with pytest.raises(RunError, match="ift train --resume"):
        open_run(copy.path)
    with pytest.raises(RunError, match=r"no manifest\.json"):
        open_run(tmp_path / "nothing")


def test_the_command_line_predicts_from_arguments_input_and_files(short_run: RunDir, ift: Ift, tmp_path: Path) -> None:
    run = str(short_run.path)
    shown = ift("predict", run, "很好", stdin="")
    assert shown.returncode == 0, shown.stderr
    label, probabilities, text = shown.stdout.strip().split("\t")
    assert label in ("正面", "负面")
    assert text == "很好"
    assert len(probabilities.split("  ")) == 2
    piped = ift("predict", run, stdin="很好\n\nterrible\n")
    assert len(piped.stdout.splitlines()) == 2
    assert piped.stdout.splitlines()[0] == shown.stdout.strip()
    (tmp_path / "in.jsonl").write_text('{"text": "很好"}\n{"messages": [{"role": "user", "content": "1"}]}\n', "utf-8")
    written = ift("predict", run, "--input", "in.jsonl", "--output", "out.jsonl")
    assert written.returncode == 0, written.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [line["answer"] in ("正面", "负面") for line in lines] == [True, True]
    answered = '{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "正面"}]}'
    (tmp_path / "bad.jsonl").write_text(f'{{"txt": "很好"}}\n{answered}\n', "utf-8")
    refused = ift("predict", run, "--input", "bad.jsonl")
    assert refused.returncode == 3
    assert "bad.jsonl:1" in refused.stderr
    assert "bad.jsonl:2" in refused.stderr


def test_the_command_line_lists_runs_and_merges(short_run: RunDir, ift: Ift, tmp_path: Path) -> None:
    listed = ift("runs", "--runs-dir", str(short_run.path.parent.parent))
    assert "succeeded" in listed.stdout
    merged = ift("merge", str(short_run.path), "--output", str(tmp_path / "m"), "--dtype", "bfloat16")
    assert merged.returncode == 0, merged.stderr
    assert "of 60 as in the run" in merged.stdout


def test_rendering_is_the_same_from_the_adapter_folder(short_run: RunDir) -> None:
    """Who serves the adapter with its own tokenizer gets the tokens of training."""
    golden = short_run.read("golden.json")
    (row,) = Renderer(AutoTokenizer.from_pretrained(short_run.adapter)).render([golden["messages"]])
    assert row.input_ids == golden["input_ids"]
    assert row.labels == golden["labels"]


def test_a_single_task_keeps_its_form(short_run: RunDir) -> None:
    scores = short_run.read("scores.json")
    assert list(scores) == [
        *("rows", "intervals", "base", "confusion", "per_class", "adapter", "calibration", "change"),
        *("unseen", "perturbed", "forgetting", "gates"),
    ]
    assert all(set(line) == {"row", "answer", "base", "adapter"} for line in short_run.read_lines("predictions.jsonl"))
