"""Exports: what each folder holds, that it is what was trained, and that it names nothing of this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl.chat_template_utils import qwen3_chat_template

from ift_peft.adapters.certificate import as_merge
from ift_peft.adapters.export import llama
from ift_peft.adapters.export import run as exporting
from ift_peft.adapters.export.building import Building, peft
from ift_peft.adapters.export.ollama import evaluate, go_template, modelfile
from ift_peft.adapters.export.public import check_public
from ift_peft.adapters.export.run import Target, export
from ift_peft.adapters.export.template import servable_template
from ift_peft.adapters.merge import merge
from ift_peft.data.render import Renderer
from ift_peft.errors import ExportError, IftPeftError
from ift_peft.infer.load import Parts, load_model, open_parts
from ift_peft.model.initialise import base_weight
from ift_peft.model.quiet import quiet
from ift_peft.model.tokenizer import TINY
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.train.run import train
from tests.e2e.small_base import make_base
from tests.train.small import small

pytestmark = pytest.mark.slow

IDS = torch.tensor([[2, 300, 400, 500, 4, 3]])


@pytest.fixture(scope="module")
def parts(one: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A run with its merge beside it, which exports take."""
    folder = tmp_path_factory.mktemp("exported") / one.path.name
    shutil.copytree(one.path, folder)
    found = open_parts(RunDir(folder))
    merge(found, output=folder / "merged", dtype="float32", reporter=Silent())
    return found


@pytest.fixture
def unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where llama-cpp-python is not installed."""
    monkeypatch.setattr(llama, "available", lambda: False)


@pytest.fixture(scope="module")
def loftq(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A run whose adapter fits quantised weights only, over a base of one layer."""
    folder = tmp_path_factory.mktemp("loftq")
    over = (f"base.model={make_base(folder / 'base')}", "base.quantization=nf4", "adapter.embeddings=false")
    recipe = small(folder, *over, "adapter.method=loftq", "training.max_steps=2", "base.device=cpu")
    return open_parts(train(recipe, root=folder / "runs", reporter=Silent()))


def write(parts: Parts, to: Target, output: Path, **options: Any) -> dict[str, Any]:
    return export(parts, to=to, output=output, reporter=Silent(), **options).checked


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_stock_peft_loads_the_adapter_from_any_folder(parts: Parts, tmp_path: Path) -> None:
    write(parts, "peft", tmp_path / "out")
    folder = (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "export.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("tiny", None)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), folder).eval()
    assert torch.equal(logits(model), logits(load_model(parts, quantization="none", compute_dtype="float32")[0]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "好"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == parts.renderer.prompts([chat])[0]
    card = (folder / "README.md").read_text("utf-8")
    assert "license: apache-2.0" in card and "python -c" in card and "正面还是负面？" in card


def as_the_card_says(folder: Path, base: Path) -> Any:
    """The model that the code in an export's card makes."""
    code = (folder / "README.md").read_text("utf-8").partition("```python\n")[2].partition("```")[0]
    code = code.replace('folder = "."', f"folder = {str(folder)!r}")
    names: dict[str, Any] = {}
    with quiet():
        exec(re.sub(r'base = ".*?"', f"base = {str(base)!r}", code), names)
    return names["model"].eval()


def test_an_adapter_over_quantised_weights_is_loaded_over_them(loftq: Parts, tmp_path: Path) -> None:
    write(loftq, "peft", tmp_path / "out")
    stock, ours = as_the_card_says(tmp_path / "out", loftq.location.folder), load_model(loftq)[0]
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, LoraLayer)}
    assert len(layers) == 7
    for name, layer in layers.items():
        theirs = stock.get_submodule(name)
        assert torch.equal(base_weight(theirs.get_base_layer()), base_weight(layer.get_base_layer())), name
        assert torch.equal(theirs.get_delta_weight("default"), layer.get_delta_weight("default")), name
    # bitsandbytes multiplies packed weights by bfloat16 on some processors
    assert (logits(stock) - logits(ours)).abs().max() < 0.2
    full, _ = load_model(loftq, quantization="none", compute_dtype="float32")
    assert (logits(full) - logits(ours)).abs().max() > 0.4, "over no other weights"
    assert "over nf4 weights; over the unquantised base" in (tmp_path / "out/README.md").read_text("utf-8")


@pytest.mark.parametrize("to", ["gguf-adapter", "vllm"])
def test_loftq_is_refused_where_it_would_lie_on_the_unquantised_base(to: Target, loftq: Parts, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    with pytest.raises(ExportError, match=r"loftq, which makes up for[\s\S]*--to merged"):
        write(loftq, to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_card_of_a_merge_names_the_method(loftq: Parts, tmp_path: Path) -> None:
    merge(loftq, output=loftq.run.path / "merged", dtype="float32", reporter=Silent())
    write(loftq, "merged", tmp_path / "out")
    for folder in (loftq.run.path / "merged", tmp_path / "out"):
        assert "\nA merge of a LoftQ adapter into `base`," in (folder / "README.md").read_text("utf-8")
    assert as_merge("\nAn (IA)³ adapter for `b`", "ia3") == "\nA merge of an (IA)³ adapter into `b`"


def test_the_merged_model_ends_where_training_ended_and_keeps_its_certificate(parts: Parts, tmp_path: Path) -> None:
    write(parts, "merged", tmp_path / "out")
    config = json.loads((tmp_path / "out/generation_config.json").read_text("utf-8"))
    assert config["eos_token_id"] == parts.renderer.end_token_id  # type: ignore[attr-defined]
    certificate = json.loads((tmp_path / "out/certificate.json").read_text("utf-8"))
    record = json.loads((tmp_path / "out/export.json").read_text("utf-8"))
    of_weights = record["files"]["model.safetensors"]["sha256"]
    assert certificate["written"]["files"] == {"model.safetensors": of_weights}
    assert "## Merge" in (tmp_path / "out/README.md").read_text("utf-8")


def test_a_merge_that_is_not_of_this_adapter_is_not_taken(parts: Parts, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    shutil.copytree(parts.run.path, folder)
    weights = load_file(folder / "merged/model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "merged/model.safetensors", metadata={"format": "pt"})
    other = open_parts(RunDir(folder))
    write(other, "merged", tmp_path / "out")
    made = load_file(tmp_path / "out/model.safetensors")["model.norm.weight"]
    assert torch.equal(made, load_file(parts.run.path / "merged/model.safetensors")["model.norm.weight"])


@pytest.mark.parametrize("to", ["peft", "merged", "ollama", "vllm"])
def test_a_local_path_stops_every_export_and_leaves_nothing(
    to: Target, parts: Parts, tmp_path: Path, unproved: None
) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    folder = tmp_path / "runs" / "run"
    shutil.copytree(parts.run.path, folder)
    card = folder / "adapter/README.md"
    card.write_text(
        card.read_text("utf-8").replace("# small", f"# small\n\nTrained in {folder}, see there.\n"), "utf-8"
    )
    with pytest.raises(IftPeftError, match=r"no path of this machine in README\.md"):
        write(open_parts(RunDir(folder)), to, tmp_path / "given" / "out")
    assert list((tmp_path / "given").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("card.md", "made in {place}/rows.jsonl"),
        ("card.md", "see `{place}`."),
        ("card.md", "see /home/somebody/rows.jsonl"),
        ("card.md", "see file:///srv/rows.jsonl"),
        ("config.json", '{{"name_or_path": "{place}"}}'),
        ("config.json", '{{"a": [{{"b": "/opt/models/base"}}]}}'),
        ("config.json", '{{"C:\\\\Users\\\\somebody\\\\base": 1}}'),
        ("Modelfile", "FROM {place}/model.gguf"),
    ],
)
def test_paths_are_found_in_texts_and_settings(name: str, content: str, tmp_path: Path) -> None:
    place = tmp_path / "private" / "run"
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).write_text(content.format(place=place), "utf-8")
    with pytest.raises(ExportError, match="no path of this machine"):
        check_public(folder, places=(place,))


def test_paths_are_found_in_metadata_of_weights(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    place = tmp_path / "private"
    for number, file in enumerate(("weights.safetensors", "weights.gguf")):
        folder = tmp_path / str(number)
        folder.mkdir()
        if file.endswith(".safetensors"):
            save_file({"a": torch.zeros(1)}, folder / file, metadata={"from": f"{place}/base"})
        else:
            writer = gguf.GGUFWriter(folder / file, "llama")
            writer.add_array("general.tags", ["fine", f"{place}/base"])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        with pytest.raises(ExportError, match=r"private"):
            check_public(folder, places=(place,))


def test_paths_are_found_in_files_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\x0a\x0e\xff\xfe\x80\x00spm")
    assert check_public(tmp_path, places=(Path("/srv/private"),)) == 1
    file.write_bytes(b"\x0a\x0e\xff\xfe\x80 /srv/private/base \x00spm")
    with pytest.raises(ExportError, match="/srv/private/base"):
        check_public(tmp_path, places=(Path("/srv/private"),))


def test_what_only_looks_like_a_path_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text(
        "rows/s, and/or 1/2, https://example.com/home/page, </think>, Qwen/Qwen3-0.6B, ./adapter", "utf-8"
    )
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"/root": 1, "/usr/bin/env": 2}}}', "utf-8")
    assert check_public(tmp_path, places=(Path("/root"), Path("/usr/bin"))) > 0


def test_an_export_that_is_there_is_replaced_only_when_told_to(parts: Parts, tmp_path: Path) -> None:
    write(parts, "peft", tmp_path / "out")
    with pytest.raises(ExportError, match="--force"):
        write(parts, "peft", tmp_path / "out")
    (tmp_path / "out/stale.txt").write_text("old", "utf-8")
    write(parts, "peft", tmp_path / "out", force=True)
    assert not (tmp_path / "out/stale.txt").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine", "utf-8")
    with pytest.raises(ExportError, match="an earlier export"):
        write(parts, "peft", tmp_path / "mine", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]
    with pytest.raises(ExportError, match="--outtype"):
        write(parts, "peft", tmp_path / "other", outtype="f16")


def test_what_comes_to_the_output_meanwhile_is_not_replaced(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(building: Building) -> dict[str, Any]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.txt").write_text("mine", "utf-8")
        return peft(building)

    monkeypatch.setitem(exporting._BUILDERS, "peft", (build, ()))
    with pytest.raises(ExportError, match="--force"):
        write(parts, "peft", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_an_export_that_cannot_be_put_in_place_leaves_the_earlier_one(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(parts, "peft", tmp_path / "out")
    (tmp_path / "out/mark.txt").write_text("earlier", "utf-8")
    rename = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(source).name == "out" and Path(source).parent != tmp_path:
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr(exporting.os, "replace", failing)
    with pytest.raises(OSError, match="no space"):
        write(parts, "peft", tmp_path / "out", force=True)
    assert (tmp_path / "out/mark.txt").read_text("utf-8") == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_classifier_goes_to_peft_and_to_no_server(classifier: RunDir, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    found = open_parts(classifier)
    for to in ("gguf", "gguf-adapter", "ollama", "vllm"):
        with pytest.raises(ExportError, match="classifier's head"):
            write(found, to, tmp_path / to)
    write(found, "peft", tmp_path / "peft")
    model = as_the_card_says(tmp_path / "peft", TINY)
    assert torch.allclose(logits(model).float(), logits(load_model(found)[0]), atol=2e-2)  # bfloat16, as it is stored
    assert list(model.config.id2label.values()) == ["正面", "负面"]
    assert model.config.pad_token_id == found.tokenizer.pad_token_id
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_the_script_for_vllm_starts_it_with_what_the_adapter_needs(two: RunDir, tmp_path: Path) -> None:
    checked = write(open_parts(two), "vllm", tmp_path / "out")
    assert checked["max_lora_rank"] == 8  # of rank 6
    (tmp_path / "vllm").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', "utf-8")
    (tmp_path / "vllm").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    script = tmp_path / "out/serve.sh"
    refused = subprocess.run([script], env=environment, capture_output=True, text=True)
    assert refused.returncode != 0 and "the folder of the base tiny" in refused.stderr
    started = subprocess.run([script, "BASE", "--port", "1"], env=environment, capture_output=True, text=True)
    arguments = started.stdout.splitlines()
    adapter = str(tmp_path / "out/adapter")
    assert arguments == [
        *("serve", "BASE", "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"small={adapter}"),
        *("--tokenizer", adapter, "--chat-template", f"{adapter}/chat_template.jinja", "--port", "1"),
    ]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 600}}, "rank 600"),
    ],
)
def test_what_vllm_does_not_serve_is_refused(
    settings: dict[str, Any], named: str, parts: Parts, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(parts.run.path, folder)
    config = folder / "adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | settings), "utf-8")
    RunDir(folder).update_manifest(adapter_sha256=RunDir(folder).adapter_hashes())
    with pytest.raises(IftPeftError) as raised:
        write(open_parts(RunDir(folder)), "vllm", tmp_path / "out")
    assert named in str(raised.value) and "--to merged" in str(raised.value)


CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
DEFAULT_SYSTEM = (
    "{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{%- endif -%}" + CHATML
)
NUMBERED = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + (loop.index | string) + message.content + '<|im_end|>' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant0' }}{%- endif -%}"
)


def templated(template: str) -> Renderer:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return Renderer(tokenizer)


@pytest.mark.parametrize("template", [None, CHATML, DEFAULT_SYSTEM, qwen3_chat_template])
def test_ollama_gets_a_template_that_renders_as_the_chat_template_does(template: str | None) -> None:
    renderer = Renderer(AutoTokenizer.from_pretrained(TINY)) if template is None else templated(template)
    text = go_template(renderer).text()
    chats: list[list[dict[str, str]]] = [
        [{"role": "user", "content": "a {{ b }}"}],
        [{"role": "system", "content": "简短"}, {"role": "user", "content": "x\n\ny"}],
        [
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "3"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "5"},
        ],
    ]
    for chat in chats:
        assert evaluate(text, chat) == renderer.aligned([chat])[0].text


def test_a_template_that_ollama_cannot_say_is_refused() -> None:
    with pytest.raises(ExportError, match="Go templates"):
        go_template(templated(NUMBERED))


def test_the_modelfile_stops_at_the_trained_token_and_keeps_the_system_message() -> None:
    template = go_template(templated(CHATML))
    text = modelfile(template, gguf="m.gguf", stop="<|im_end|>", context=40960, system="Be short.")
    assert text.startswith("FROM ./m.gguf\n") and 'SYSTEM """Be short."""\n' in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text and "PARAMETER num_ctx 8192\n" in text
    with pytest.raises(ExportError, match="quotation marks"):
        modelfile(template, gguf="m.gguf", stop="x", context=1, system='a """ b')


def test_servers_get_a_template_without_marks_that_writes_the_prompts_of_training() -> None:
    renderer = templated(qwen3_chat_template)
    template = servable_template(renderer)
    assert "generation" not in template.replace("add_generation_prompt", "")
    chat = [{"role": "user", "content": "1"}]
    rendered = renderer.tokenizer.apply_chat_template(
        chat, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert rendered == renderer.aligned([chat])[0].text and "</think>" in rendered
    with pytest.raises(ExportError, match="prompts of training"):
        servable_template(templated(CHATML.replace("assistant\n", "assistant\n# ")))


def test_the_record_says_that_nothing_was_proved(parts: Parts, tmp_path: Path, unproved: None) -> None:
    pytest.importorskip("gguf", reason="needs the extra gguf")
    checked = write(parts, "ollama", tmp_path / "out")
    assert checked["proof"] is None and "not installed" in checked["why_no_proof"]
    assert "was not run in llama.cpp" in (tmp_path / "out/README.md").read_text("utf-8")
    assert "FROM ./small-f16.gguf" in (tmp_path / "out/Modelfile").read_text("utf-8")


def test_the_missing_library_is_named_with_its_command(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ExportError, match=r"pip install 'ift_peft\[gguf\]'"):
        write(parts, "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())
