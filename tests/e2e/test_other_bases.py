"""A real base of another kind, and the installed wheel, through the same commands."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ift_peft.run_dir import open_run
from tests.conftest import OFFLINE, ROOT, Ift

STEPS = "training.max_steps=3"
CPU = "base.device=cpu"


@pytest.mark.slow
def test_a_llama_without_chat_template_and_pad_token_trains_merges_and_predicts(
    ift: Ift, stories: str, tmp_path: Path
) -> None:
    small = ("data.max_train_rows=24", "data.max_test_rows=8", STEPS)
    trained = ift("train", "sentiment", f"base.model={stories}", CPU, *small)
    assert trained.returncode == 0, trained.stderr
    assert "has no pad token" in trained.stderr
    assert "has no chat template" in trained.stderr
    run = open_run(tmp_path / "runs/sentiment/latest")
    assert run.read("manifest.json")["template"].startswith("fallback")
    assert "Assistant:" in (run.adapter / "chat_template.jinja").read_text("utf-8")
    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert any("embed_tokens.lora_embedding_A" in name for name in weights)
    assert not any(name.endswith("embed_tokens.weight") for name in weights), "the adapter must not carry the base"
    for arguments in (("merge", str(run.path)), ("predict", str(run.path), "fine"), ("evaluate", str(run.path))):
        done = ift(*arguments)
        assert done.returncode == 0, done.stderr
    # The base is tied and the adapter changed its embedding: the head must still be the base's.
    merged = load_file(run.path / "merged" / "model.safetensors")
    base = load_file(Path(stories) / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(merged["model.embed_tokens.weight"], merged["lm_head.weight"])


@pytest.mark.slow
def test_labels_that_rename_stored_values_survive_measuring_and_merging(ift: Ift, tmp_path: Path) -> None:
    rows = "".join(f'{{"text": "text {i}", "label": {i % 2}}}\n' for i in range(20))
    (tmp_path / "rows.jsonl").write_text(rows, "utf-8")
    (tmp_path / "swap.yaml").write_text(
        'data: {train: rows.jsonl, test_size: 6, labels: {"0": "1", "1": "0"}}\n'
        "base: {device: cpu}\nadapter: {r: 4}\ntraining: {max_steps: 2}\n",
        "utf-8",
    )
    trained = ift("train", "swap.yaml")
    assert trained.returncode == 0, trained.stderr
    run = open_run(tmp_path / "runs/swap")
    again = ift("evaluate", str(run.path))
    assert again.returncode == 0, again.stderr
    assert f"{run.read('scores.json')['adapter']['accuracy']['value']:.3f}" in again.stdout
    assert ift("merge", str(run.path)).returncode == 0


@pytest.mark.slow
def test_a_task_without_labels_is_measured_by_loss_and_answers_by_generating(
    ift: Ift, stories: str, tmp_path: Path
) -> None:
    rows = "".join(
        f'{{"prompt": "Tell me about day {i}.", "completion": "Once upon day {i}, Tim ran."}}\n' for i in range(20)
    )
    (tmp_path / "rows.jsonl").write_text(rows, "utf-8")
    (tmp_path / "story.yaml").write_text(
        f"base: {{model: {stories}, device: cpu}}\ndata: {{train: rows.jsonl, test_size: 4}}\n"
        "training: {max_steps: 12, learning_rate: 1e-2, per_device_train_batch_size: 8}\n",
        "utf-8",
    )
    trained = ift("train", "story.yaml")
    assert trained.returncode == 0, trained.stderr
    scores = open_run(tmp_path / "runs/story").read("scores.json")
    assert scores["adapter"]["loss"]["high"] < scores["base"]["loss"]["low"]
    assert scores["change"]["loss"]["high"] < 0
    answered = ift("predict", "runs/story/latest", "Tell me about day 3.", "--max-new-tokens", "12")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()


@pytest.mark.slow
def test_the_wheel_trains_from_any_folder_without_network(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(packages),
            str(wheel),
        ],
        check=True,
    )
    # The dependencies are those of this environment; the checkout itself is not on the path.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()), "utf-8")
    folder = tmp_path / "anywhere"
    folder.mkdir()
    options = {
        "cwd": folder,
        "env": {**os.environ, "PYTHONPATH": str(OFFLINE)},
        "capture_output": True,
        "text": True,
        "timeout": 600,
    }
    where = subprocess.run([python, "-c", "import ift_peft; print(ift_peft.__file__)"], **options)
    assert str(environment) in where.stdout
    trained = subprocess.run(
        [python, "-m", "ift_peft", "train", "sentiment", "data.max_train_rows=24", "data.max_test_rows=8", STEPS, CPU],
        **options,
    )
    assert trained.returncode == 0, trained.stderr
    assert open_run(folder / "runs/sentiment/latest").status == "succeeded"
