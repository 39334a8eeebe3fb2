"""Refused before training, naming cause and fix, and leaving no run folder behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ift_peft.errors import IftPeftError
from ift_peft.recipe import load_recipe
from ift_peft.reporter import Silent
from ift_peft.train.run import train
from tests.conftest import Ift

GOOD = "".join(f'{{"text": "很好{i}", "label": "正面"}}\n{{"text": "很差{i}", "label": "负面"}}\n' for i in range(4))


def refusal(tmp_path: Path, overrides: Sequence[str], rows: bytes = GOOD.encode()) -> IftPeftError:
    (tmp_path / "rows.jsonl").write_bytes(rows)
    path = tmp_path / "mine.yaml"
    path.write_text("data:\n  train: rows.jsonl\n  labels: [负面, 正面]\n", "utf-8")
    with pytest.raises(IftPeftError) as caught:
        train(load_recipe(str(path), overrides), root=tmp_path / "runs", reporter=Silent())
    assert not (tmp_path / "runs").exists()
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.lerning_rate=1", ("'lerning_rate'", "did you mean 'learning_rate'")),
        ("data.train=missing.jsonl", ("nothing at missing.jsonl", "check the path")),
        ("base.model=someone/unknown", ("'someone/unknown'", "base.model=tiny")),
        ("adapter.target_modules=[q_prj]", ("'q_prj'", "q_proj")),
        ("training.max_length=9999", ("9999", "training.max_length=512")),
        ("training.optim=sgdx", ("sgdx", "change")),
        ("training.max_length=4", ("rows.jsonl:1", "raise training.max_length")),
    ],
)
def test_a_faulty_setting_is_refused(tmp_path: Path, override: str, parts: tuple[str, ...]) -> None:
    text = str(refusal(tmp_path, [override]))
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b'{"text": "x", "label": ', ("rows.jsonl:9", "JSON")),
        (b'{"text": "\xc4\xe3", "label": "x"}', ("rows.jsonl:9", "UTF-8", "0xc4")),
        ('{"text": "x", "label": "中性"}'.encode(), ("rows.jsonl:9", "'中性'", "data.labels")),
        (b'{"text": "x", "label": ""}', ("rows.jsonl:9", "a label out of")),
        (b'{"text": "  ", "label": "1"}', ("rows.jsonl:9", "an empty cell")),
    ],
)
def test_a_faulty_row_is_refused_by_its_line(tmp_path: Path, line: bytes, parts: tuple[str, ...]) -> None:
    text = str(refusal(tmp_path, [], GOOD.encode() + line + b"\n"))
    for part in parts:
        assert part in text


def test_empty_answers_are_refused(tmp_path: Path) -> None:
    rows = b'{"prompt": "q", "completion": "a"}\n{"prompt": "q2", "completion": ""}\n'
    assert "rows.jsonl:2" in str(refusal(tmp_path, ["data.labels=null"], rows))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    config.save_pretrained(tmp_path / "base")
    torch.save(LlamaForCausalLM(config).state_dict(), tmp_path / "base" / "pytorch_model.bin")
    assert "pytorch_model.bin" in str(refusal(tmp_path, [f"base.model={tmp_path / 'base'}"]))


@pytest.mark.slow
def test_the_command_line_prints_the_refusal_and_exits_with_its_code(ift: Ift) -> None:
    refused = ift("train", "sentiment", "training.lerning_rate=1")
    assert refused.returncode == 2
    assert "did you mean 'learning_rate'" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert ift("train").returncode == 2
    assert ift("train", "sentimnet").returncode == 2
    assert ift("predict", "nowhere", "x").returncode == 5


def test_help_and_the_package_import_no_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nimport ift_peft.recipe\nfrom ift_peft.cli import app\n"
        "for args in (['--help'], ['train', '--help'], ['recipes']):\n"
        "    result = CliRunner().invoke(app, args)\n    assert result.exit_code == 0, result.output\n"
        "    assert 'Example' in result.output or 'sentiment' in result.output\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'bitsandbytes'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recipes_are_listed_and_shown(ift: Ift) -> None:
    listed = ift("recipes")
    assert any(line.startswith("sentiment ") for line in listed.stdout.splitlines())
    assert ift("recipes", "--show", "sentiment").stdout.startswith("name: sentiment")
