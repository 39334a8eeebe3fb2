"""A run is opened on what it was trained with or not at all, by whatever command, and the difference is shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.main import get_command
from typer.testing import CliRunner

from ift_peft.cli import app
from ift_peft.errors import IftPeftError
from ift_peft.infer.load import open_parts
from ift_peft.model.tokenizer import TINY, BaseLocation
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.train.run import train
from tests.train.small import small

pytestmark = pytest.mark.slow

OPENING = {  # commands that load a run's model, with what they need besides the run
    "predict": ["text"],
    "evaluate": [],
    "merge": ["--output", "merged"],
    "export": ["--to", "peft"],
    "explain": ["--text", "text"],
    "lm-eval": ["--tasks", "arc_easy"],
    "combine": ["RUN"],
}
READING = {"report", "compare"}  # commands that show what is recorded in a run and load nothing
OF_PARTS = {"pipeline"}  # commands on runs of several, which open each as these here
Tamper = Callable[[Path, RunDir], None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("parity")
    shutil.copytree(TINY, folder / "base")
    recipe = small(folder / "data", "training.max_steps=2", f"base.model={folder / 'base'}")
    return train(recipe, root=folder / "runs", reporter=Silent())


@pytest.fixture
def moved(trained: RunDir, tmp_path: Path) -> tuple[Path, RunDir]:
    """A copy of the base, and of the run, on that copy."""
    shutil.copytree(TINY, tmp_path / "base")
    shutil.copytree(trained.path, tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    text = recipe.read_text("utf-8")
    recipe.write_text(text.replace(str(trained.path.parents[2] / "base"), str(tmp_path / "base")), "utf-8")
    return tmp_path / "base", RunDir(tmp_path / "run")


def edit_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **entries}), "utf-8")


def scale(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, path, metadata={"format": "pt"})


def other_template(base: Path, run: RunDir) -> None:
    path = base / "chat_template.jinja"
    path.write_text(path.read_text("utf-8").replace("{% generation %}", "Answer: {% generation %}"), "utf-8")


def other_tokens(base: Path, run: RunDir) -> None:
    """Two tokens of the golden example change places in the vocabulary."""
    path = base / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    one, two = [one for one in dict.fromkeys(run.read("golden.json")["input_ids"]) if one > 20][-2:]
    names = {number: name for name, number in content["model"]["vocab"].items()}
    content["model"]["vocab"] |= {names[one]: two, names[two]: one}
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")


TAMPERS: dict[str, tuple[Tamper, list[str]]] = {
    "weights": (
        lambda base, run: scale(base / "model.safetensors"),
        ["the base as in training", "model.safetensors: other content of the same size", "restore the base"],
    ),
    "a file more": (
        lambda base, run: save_file({}, base / "more.safetensors"),
        ["the base as in training", "more.safetensors: not there in training"],
    ),
    "configuration": (
        lambda base, run: edit_json(base / "config.json", rms_norm_eps=0.5),
        ["the base as in training", "config.json, rms_norm_eps: 0.5, not 1e-06"],
    ),
    "template": (
        other_template,
        ["the chat template as in training", "--- as trained", "+++ as found", "+", "Answer: "],
    ),
    "tokens": (other_tokens, ["the golden example's tokens as in training", "at position", "where training had"]),
    "adapter": (
        lambda base, run: scale(run.adapter / "adapter_model.safetensors"),
        ["adapter/adapter_model.safetensors as in training", "another ("],
    ),
    "adapter's configuration": (
        lambda base, run: edit_json(run.adapter / "adapter_config.json", lora_alpha=8),
        ["adapter/adapter_config.json as in training", "another ("],
    ),
    "no adapter": (
        lambda base, run: (run.adapter / "adapter_model.safetensors").unlink(),
        ["adapter/adapter_model.safetensors as in training", "none in"],
    ),
}


def test_every_command_on_runs_is_known_to_this_test() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    on_runs = {name for name, one in commands.items() if {"run", "runs"} & {option.name for option in one.params}}
    assert on_runs == OPENING.keys() | READING | OF_PARTS


@pytest.mark.parametrize("tamper", TAMPERS)
def test_what_differs_is_refused_and_shown(tamper: str, moved: tuple[Path, RunDir]) -> None:
    base, run = moved
    open_parts(run)
    change, told = TAMPERS[tamper]
    change(base, run)
    with pytest.raises(IftPeftError) as caught:
        open_parts(run)
    assert all(text in str(caught.value) for text in told), str(caught.value)
    assert caught.value.exit_code == 5


def test_the_first_token_that_differs_is_named_as_it_was_and_as_it_is(moved: tuple[Path, RunDir]) -> None:
    base, run = moved
    parts, ids = open_parts(run), run.read("golden.json")["input_ids"]
    one, two = [one for one in dict.fromkeys(ids) if one > 20][-2:]
    at = min(ids.index(one), ids.index(two))
    other_tokens(base, run)
    with pytest.raises(IftPeftError) as caught:
        open_parts(run)
    text, swapped = parts.tokenizer.decode([ids[at]]), one + two - ids[at]
    assert f"{text!r} (id {swapped}) at position {at}" in str(caught.value)
    assert f"where training had {text!r} (id {ids[at]})" in str(caught.value)


def test_a_run_that_recorded_less_is_opened_and_refused_by_hash(moved: tuple[Path, RunDir]) -> None:
    """Runs of before files, settings, template and adapter were recorded."""
    base, run = moved
    manifest, golden = run.read("manifest.json"), run.read("golden.json")
    del manifest["adapter_sha256"], manifest["base"]["files"], manifest["base"]["config"], golden["template"]
    run.write("manifest.json", manifest)
    run.write("golden.json", golden)
    open_parts(run)
    scale(base / "model.safetensors")
    other_template(base, run)
    with pytest.raises(IftPeftError) as caught:
        open_parts(run)
    assert all(text in str(caught.value) for text in ("the base as in training", "the chat template as in training"))
    assert "model.safetensors" not in str(caught.value)


@pytest.mark.parametrize("command", OPENING)
def test_every_command_that_loads_a_model_refuses(
    command: str, moved: tuple[Path, RunDir], trained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "lm-eval":
        pytest.importorskip("lm_eval", reason="needs the extra ift_peft[lm-eval]")
    base, run = moved
    monkeypatch.chdir(base.parent)
    monkeypatch.setenv("COLUMNS", "200")
    for change, _ in (TAMPERS[name] for name in ("weights", "template", "tokens", "adapter")):
        change(base, run)
    before = sorted(run.path.rglob("*"))
    extra = [str(trained.path) if word == "RUN" else word for word in OPENING[command]]
    ended = CliRunner().invoke(app, [command, str(run.path), *extra])
    assert ended.exit_code == 5, ended.output
    for name in ("weights", "template", "tokens", "adapter"):
        assert TAMPERS[name][1][0] in ended.output, ended.output
    assert sorted(run.path.rglob("*")) == before and not (base.parent / "merged").exists()


def test_several_runs_that_answer_together_are_checked_as_well(moved: tuple[Path, RunDir], trained: RunDir) -> None:
    _, run = moved
    scale(run.adapter / "adapter_model.safetensors")
    for command in ("predict", "evaluate"):
        arguments = [command, str(trained.path), str(run.path), "--ensemble", "vote"]
        ended = CliRunner().invoke(app, arguments, input="text\n")
        assert ended.exit_code == 5, ended.output
        assert "adapter/adapter_model.safetensors as in training" in " ".join(ended.output.split())


def test_the_fingerprint_of_a_base_stays_what_it_was() -> None:
    """Runs and published results hold it."""
    assert BaseLocation("tiny", TINY, None).fingerprint().startswith("808bfe38b94a2fff")
