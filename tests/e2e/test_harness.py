"""lm-evaluation-harness on a run: its scores are those of our own likelihoods, base and adapter apart, no network."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ift_peft.data.render import IGNORE, Rendered
from ift_peft.errors import DataError, RecipeError
from ift_peft.evaluate.harness import harness_scores, require_known
from ift_peft.evaluate.metrics import Resampling
from ift_peft.infer.likelihood import answer_likelihoods
from ift_peft.infer.load import load_model, open_parts
from ift_peft.recipe import recipes_root
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from tests.conftest import Ift

pytest.importorskip("lm_eval", reason="needs the extra ift_peft[lm-eval]")
pytestmark = pytest.mark.slow

CHOICES = ("负面", "正面")
ASKED = "请将以下文本分类为正面或负面。\n{text}"
RESAMPLING = Resampling(samples=200)
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "请将以下文本分类为正面或负面。\\n{{{{text}}}}"
doc_to_choice: [负面, 正面]
doc_to_target: label
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: brier_score, aggregation: brier_score, higher_is_better: false}}
  - {{metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


class Notes(Silent):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def reviews(number: int = 12) -> list[dict[str, Any]]:
    """Held-out reviews, each class in turn."""
    lines = (recipes_root() / "data" / "reviews" / "test.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    pairs = zip(*([row for row in rows if row["label"] == label] for label in CHOICES), strict=False)
    return [{"text": row["text"], "label": CHOICES.index(row["label"])} for pair in pairs for row in pair][:number]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with the task `reviews`, over twelve rows in a local file."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in reviews()), "utf-8")
    text = TASK.format(name="reviews", rows=rows, cache=tmp_path / "cache")
    (folder / "reviews.yaml").write_text(text, "utf-8")
    return folder


def by_hand(run: RunDir, *, adapter: bool, chat: bool) -> list[bool]:
    """Whether the likelier answer to each review is the right one, by our own likelihoods of the same tokens."""
    parts = open_parts(run)
    model, _ = load_model(parts)
    tokenizer = parts.tokenizer
    rendered = []
    for row in reviews():
        asked = ASKED.format(text=row["text"])
        if chat:
            (prompt,) = parts.renderer.prompts([({"role": "user", "content": asked},)])
        else:
            prompt = tokenizer(asked)["input_ids"]
        for choice in CHOICES:
            answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
            rendered.append(Rendered([*prompt, *answer], [IGNORE] * len(prompt) + answer))
    with nullcontext() if adapter else model.disable_adapter():
        found = answer_likelihoods(model, rendered, batch_size=5, pad_token_id=tokenizer.pad_token_id)
    chosen = np.array([one.log_probability for one in found]).reshape(-1, 2).argmax(axis=1)
    return [bool(index == row["label"]) for index, row in zip(chosen, reviews(), strict=True)]


@pytest.mark.parametrize("chat", [True, False], ids=["chat template", "plain"])
def test_its_accuracy_is_that_of_our_own_likelihoods(short_run: RunDir, tasks: Path, chat: bool) -> None:
    notes = Notes()
    found = harness_scores(
        short_run,
        ["reviews"],
        include_path=tasks,
        apply_chat_template=chat,
        batch_size=5,
        resampling=RESAMPLING,
        reporter=notes,
    )
    measured = found["tasks"]["reviews"]
    hits = {who: by_hand(short_run, adapter=who == "adapter", chat=chat) for who in ("base", "adapter")}
    accuracy = measured["scores"]["acc"]
    assert measured["samples"] == 12
    for who, own in hits.items():
        assert accuracy[who]["value"] == sum(own) / 12
        assert accuracy[who]["stderr"] == pytest.approx(np.std(own, ddof=1) / 12**0.5)
    change = accuracy["change"]
    assert change["value"] == pytest.approx((sum(hits["adapter"]) - sum(hits["base"])) / 12, abs=1e-6)
    assert change["low"] <= change["value"] <= change["high"]
    assert not [note for note in notes.told if note.startswith("lm-eval")]


def test_base_and_adapter_are_two_models(short_run: RunDir, tasks: Path) -> None:
    """Their probabilities differ where one was trained; one alone is measured as beside the other."""
    asked = {"include_path": tasks, "apply_chat_template": True, "resampling": RESAMPLING, "reporter": Silent()}
    both = harness_scores(short_run, ["reviews"], **asked)["tasks"]["reviews"]["scores"]
    brier = both["brier_score"]
    assert abs(brier["adapter"]["value"] - brier["base"]["value"]) > 1e-3
    assert brier["change"] == {"value": brier["adapter"]["value"] - brier["base"]["value"]}, "it is no mean of samples"
    for who in ("base", "adapter"):
        alone = harness_scores(short_run, ["reviews"], who=(who,), **asked)["tasks"]["reviews"]["scores"]
        assert alone == {metric: {who: own[who]} for metric, own in both.items()}


def test_the_command_prints_and_writes_what_it_measured(
    short_run: RunDir, tasks: Path, ift: Ift, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tasks.parent / "out.json"
    options = ("--tasks", "reviews", "--include-path", str(tasks), "--apply-chat-template", "--limit", "10")
    done = ift("lm-eval", str(short_run.path), *options, "--output", str(output))
    assert done.returncode == 0, done.stderr
    written = json.loads(output.read_text("utf-8"))
    accuracy = written["tasks"]["reviews"]["scores"]["acc"]
    assert written["tasks"]["reviews"]["samples"] == 10
    assert f"{accuracy['adapter']['value']:.3f} ± {accuracy['adapter']['stderr']:.3f}" in done.stdout
    assert written["versions"]["lm_eval"] and str(tasks) not in output.read_text("utf-8")
    assert not (short_run.path / "lm-eval.json").exists()
    assert written["tasks"]["reviews"]["scores"]["mcc"]["base"]["stderr"] is not None
    for noise in ("Warning", "WARNING", "fatal", "it/s", "pretrained", "bootstrapping"):
        assert noise not in done.stderr + done.stdout + "".join(capfd.readouterr())


def test_what_it_cuts_is_told(short_run: RunDir, tasks: Path) -> None:
    rows = tasks.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({**row, "text": row["text"] * 200}) + "\n" for row in reviews(3)), "utf-8")
    notes = Notes()
    harness_scores(short_run, ["reviews"], who=("base",), include_path=tasks, resampling=RESAMPLING, reporter=notes)
    (told,) = (note for note in notes.told if note.startswith("lm-eval"))
    assert "exceeds model's maximum length (512)" in told and "(6 times)" in told


def test_tasks_that_cannot_be_read_are_refused(short_run: RunDir, tasks: Path) -> None:
    (tasks.parent / "rows.jsonl").unlink()
    with pytest.raises(DataError, match="tasks that can be read: reviews"):
        harness_scores(short_run, ["reviews"], include_path=tasks, resampling=RESAMPLING, reporter=Silent())


def test_an_unknown_task_is_named_with_the_nearest() -> None:
    require_known(["reviews"], {"reviews", "arc_easy"})
    with pytest.raises(RecipeError, match=r"found review, arc_eays[\s\S]*did you mean reviews"):
        require_known(["review", "arc_eays"], {"reviews", "arc_easy"})


def test_without_the_extra_it_says_what_to_install(
    short_run: RunDir, ift: Ift, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "ift_peft.evaluate.harness")
    result = ift("lm-eval", str(short_run.path), "--tasks", "arc_easy")
    assert result.returncode == 1 and "fix pip install 'ift_peft[lm-eval]'" in result.stderr


def test_one_of_two_models_alone_or_both(short_run: RunDir, ift: Ift) -> None:
    refused = ift("lm-eval", str(short_run.path), "--tasks", "reviews", "--base-only", "--adapter-only")
    assert refused.returncode == 2
