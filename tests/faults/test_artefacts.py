"""Hostile adapters, bases, chat templates and run folders, given to the real command line: refused, and never run."""

# ruff: noqa: E501 - a row of the table is a line
from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file, save_file

from ift_peft.data.template import TooSlow, of_one_day, try_template, within
from ift_peft.errors import ModelError
from tests.e2e.small_base import make_base
from tests.faults.conftest import Observed
from tests.faults.forks import Forks
from tests.faults.trained import IN_TIME, came_to, succeeded, told
from tests.train.small import write_small

Change = Callable[[Path], object]
LORA_A = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
ALL = ("predict", "evaluate", "merge", "combine", "export")


class Evil:
    """What leaves a file `pwned` in the working directory when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@dataclass(frozen=True)
class Case:
    fault: str
    change: Change
    code: int
    words: tuple[str, ...] = ()
    commands: tuple[str, ...] = ("predict",)
    fast: bool = True
    recorded: bool = True
    """Whether the manifest's hashes are made those of the changed adapter, as one who knows of them would."""

    @property
    def expected(self) -> str:
        return f"exit {self.code}, {' and '.join(self.words)}" if self.code else "exit 0, nothing of it used"


def settings(name: str, **entries: Any) -> Change:
    """Entries of a JSON file of the run replaced."""

    def change(run: Path) -> None:
        content = json.loads((run / name).read_text("utf-8"))
        (run / name).write_text(json.dumps({**content, **entries}), "utf-8")

    return change


def config(**entries: Any) -> Change:
    return settings("adapter/adapter_config.json", **entries)


def text(name: str, content: str) -> Change:
    return lambda run: (run / name).write_text(content, "utf-8")


def tensors(change_them: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(run: Path) -> None:
        path = run / "adapter" / "adapter_model.safetensors"
        found = load_file(path)
        change_them(found)
        save_file(found, path)

    return change


def weights(content: bytes) -> Change:
    return lambda run: (run / "adapter" / "adapter_model.safetensors").write_bytes(content)


def header(content: bytes, body: bytes = b"0000") -> bytes:
    return struct.pack("<Q", len(content)) + content + body


def pickled(run: Path) -> None:
    (run / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))


def only_pickled(run: Path) -> None:
    pickled(run)
    (run / "adapter" / "adapter_model.safetensors").unlink()


def elsewhere(found: dict[str, torch.Tensor]) -> None:
    for key in list(found):
        found[key.replace("layers.0", "layers.7")] = found.pop(key)


def without_number(found: dict[str, torch.Tensor]) -> None:
    found[LORA_A][0, 0] = float("nan")


ENDLESS = "(([a-z0-9._]+)+)+!"


def in_both(pattern: str, setting: str = "target_modules") -> Change:
    """The same pattern in the adapter's configuration and in the recipe, which come together."""

    def change(run: Path) -> None:
        value: Any = pattern if setting == "target_modules" else {pattern: 4}
        config(**{setting: value})(run)
        found = yaml.safe_load((run / "recipe.yaml").read_text("utf-8"))
        found["adapter"][setting] = value
        (run / "recipe.yaml").write_text(yaml.safe_dump(found, allow_unicode=True), "utf-8")

    return change


HUGE = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
RUNS = [
    Case("a pickle in the place of the adapter's weights", only_pickled, 4, ("only a pickled one",), ALL),
    Case("a pickle beside the adapter's weights", pickled, 0, (), ("predict", "merge")),
    Case("a pickle named as safetensors", weights(pickle.dumps(Evil())), 4, ("weights in safetensors",), ("predict", "combine", "export")),
    Case("safetensors cut off", lambda run: os.truncate(run / "adapter" / "adapter_model.safetensors", 2000), 4, ("weights in safetensors",), fast=False),
    Case("a header longer than its file", weights(struct.pack("<Q", 1 << 40) + b"{}"), 4, ("weights in safetensors",)),
    Case("a tensor of 4 TB in the header", weights(header(HUGE)), 4, ("weights in safetensors",)),
    Case("two tensors in the same bytes", weights(header(TWICE)), 4, ("weights in safetensors",), fast=False),
    Case("an adapter whose weights changed after training", tensors(lambda t: t[LORA_A].add_(1)), 5, ("as in training",), recorded=False, fast=False),
    Case("NaN in an adapter's weights", tensors(without_number), 4, ("NaN or infinity",)),
    Case("a tensor missing, which PEFT draws at random", tensors(lambda t: t.pop(LORA_A)), 4, ("a tensor for", LORA_A)),
    Case("a tensor of no module", tensors(lambda t: t.update(hello=torch.zeros(4))), 4, ("without a place, as hello",)),
    Case("an adapter for a base of other modules", tensors(elsewhere), 4, ("14 missing",), ("predict", "evaluate"), fast=False),
    Case("an adapter for a base of another width", tensors(lambda t: t.update({LORA_A: torch.zeros(4, 65)})), 4, ("an adapter of this base", "size mismatch")),
    Case("another rank in the configuration than in the weights", config(r=8), 4, ("an adapter of this base", "size mismatch")),
    Case("a rank that is a word", config(r="x"), 4, ("a rank of 1 to",), ("predict", "merge"), fast=False),
    Case("a rank of 10^15", config(r=10**15), 4, ("a rank of 1 to",)),
    Case("a rank of 50,000 for every module", config(r=50_000), 4, ("a rank of 1 to 1,024",), fast=False),
    Case("a method that PEFT does not know", config(peft_type="NOPE"), 4, ("peft_type out of",), ALL, fast=False),
    Case("another method than the weights are of", config(peft_type="IA3"), 4, (), ("predict",)),
    Case("a library for PEFT to import", config(auto_mapping={"base_model_class": "X", "parent_library": "antigravity"}, task_type=None), 4, ("no auto_mapping",)),
    Case("a Megatron module for PEFT to import", config(megatron_config={"a": 1}, megatron_core="antigravity"), 4, ("no megatron_config",), fast=False),
    Case("a Hub id as the adapter's base", config(base_model_name_or_path="nobody/nothing"), 0, (), ("predict", "merge"), fast=False),
    Case("a pattern of modules that takes for ever", config(target_modules="(([a-z0-9._]+)+)+!"), 4, ("patterns of modules that are matched in",), ("predict", "merge")),
    Case("a pattern that takes for ever in the configuration and in the recipe", in_both(ENDLESS), 4, ("patterns of modules that are matched in",), ("predict", "merge"), fast=False),
    Case("such a pattern with a rank, in both", in_both(ENDLESS, "rank_pattern"), 4, ("patterns of modules that are matched in",), fast=False),
    Case("a pattern in a list of layers", config(layers_to_transform=[0], layers_pattern=[ENDLESS]), 4, ("no layers_pattern",)),
    Case("a pattern of feed-forward modules that takes for ever", config(feedforward_modules=ENDLESS), 4, ("an adapter of this base",), fast=False),
    Case("a pattern in the place of modules to save", config(modules_to_save=[ENDLESS]), 4, ("modules_to_save to be a list of names",)),
    Case("a rank of 30 million for one module", config(rank_pattern={"q_proj": 3 * 10**7}), 4, ("a rank of 1 to",)),
    Case("a rank of ten million to begin with", config(init_r=10**7), 4, ("a rank of 1 to",), fast=False),
    Case("a scale that is no number", config(lora_alpha=float("nan")), 4, ("lora_alpha of at most",)),
    Case("a scale of 10^308 for one module", config(alpha_pattern={"q_proj": 1e308}), 4, ("lora_alpha of at most",), fast=False),
    Case("tokens at which an adapter begins", config(alora_invocation_tokens=[1]), 4, ("no alora_invocation_tokens",), fast=False),
    Case("a configuration that is a list", text("adapter/adapter_config.json", "[]"), 4, ("an object in",), fast=False),
    Case("100,000 lists inside each other as a configuration", text("adapter/adapter_config.json", "[" * 100_000), 4, ("RecursionError",)),
    Case("a manifest of nothing", text("manifest.json", "{}"), 5, ("status 'unknown'",), recorded=False, fast=False),
    Case("a manifest without inputs", settings("manifest.json", inputs=None), 5, ("inputs in",), recorded=False),
    Case("a kind of run that there is not", settings("manifest.json", kind="zzz"), 5, ("a run of the kind",), recorded=False, fast=False),
    Case("a golden example of nothing", text("golden.json", "{}"), 5, ("template_sha256 in",), recorded=False),
    Case("a golden example with ids beyond all tokens", settings("golden.json", input_ids=[1 << 40]), 5, ("input_ids.0 in",), recorded=False, fast=False),
    Case("a golden example of 100,000 lists", text("golden.json", "[" * 100_000), 5, ("recursion",), recorded=False, fast=False),
    Case("a held-out row without messages", text("test.jsonl", '{"where": "x"}\n'), 3, ("a row of {messages, where}",), ("evaluate",), recorded=False),
    Case("a held-out row that is no JSON", text("test.jsonl", '{"where"\n'), 5, ("one JSON object a line", "line 1"), ("evaluate",), recorded=False, fast=False),
    Case("no held-out row at all", text("test.jsonl", ""), 5, ("held-out rows",), ("evaluate",), recorded=False),
    Case("a recipe of a run that names a remote base", lambda run: (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text("utf-8").replace("model: /", "model: https://example.com/"), "utf-8"), 4, ("base.model to be tiny",), ("predict", "merge"), recorded=False, fast=False),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(server: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps over a base of one layer."""
    folder = tmp_path_factory.mktemp("trained")
    settings = (f"base.model={make_base(folder / 'base')}", "adapter.embeddings=false", "data.max_train_rows=16")
    succeeded(server.run("train", str(write_small(folder)), *settings, "training.max_steps=2", cwd=folder))
    return (folder / "runs" / "small" / "latest").resolve()


@pytest.fixture(scope="module")
def answered(server: Forks, trained: Path) -> str:
    """What `ift predict` answers of it."""
    process = server.run("predict", str(trained), "好", cwd=trained)
    succeeded(process)
    assert process.stdout
    return process.stdout


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = {"test_run": RUNS, "test_base": BASES}[metafunc.function.__name__]
        every = metafunc.config.getoption("--all-faults")
        chosen = cases if every else [one for one in cases if one.fast][::2]  # one in two: a minute of all the tests
        metafunc.parametrize(
            ("fault", "expected", "case"), [(c.fault, c.expected, c) for c in chosen], ids=[c.fault for c in chosen]
        )


def recorded_again(run: Path) -> None:
    names = ("adapter_config.json", "adapter_model.safetensors")
    there = [run / "adapter" / name for name in names if (run / "adapter" / name).is_file()]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in there}
    settings("manifest.json", adapter_sha256=hashes)(run)


@pytest.mark.fault("artefacts", "{fault}", expected="{expected}")
def test_run(
    fault: str,
    expected: str,
    case: Case,
    server: Forks,
    trained: Path,
    answered: str,
    tmp_path: Path,
    observed: Observed,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    case.change(run)
    if case.recorded:
        recorded_again(run)
    more = {"predict": ("好",), "combine": (str(trained), "--output-name", "x"), "export": ("--to", "peft")}  # fmt: skip
    seen = []
    for command in case.commands:
        process = server.run(command, str(run), *more.get(command, ()), cwd=tmp_path, timeout=IN_TIME)
        came_to(process, case.code, case.words)
        assert command != "predict" or process.stdout == ("" if case.code else answered)
        assert not list(tmp_path.rglob("pwned"))
        seen.append(f"{command}: exit {process.returncode}")
    observed("; ".join(seen) + (f" {told(process)[:140]}" if case.code else ""))


TEXTS = {
    "half of a surrogate pair in a text to answer": '{"text": "好"}\n{"text": "\\ud800"}\n',
    "a NUL in a message to answer": '{"messages": [{"role": "user", "content": "a\\u0000"}]}\n',
    "10,000 lists inside each other to answer": "[" * 10_000 + "\n",
}


@pytest.mark.fault("inputs", "{fault}", expected="exit 3, naming the line, before a model is loaded")
@pytest.mark.parametrize("fault", TEXTS)
def test_texts_to_answer(fault: str, server: Forks, trained: Path, tmp_path: Path, observed: Observed) -> None:
    (tmp_path / "texts.jsonl").write_text(TEXTS[fault], "utf-8")
    process = server.run("predict", str(trained), "--input", "texts.jsonl", cwd=tmp_path, timeout=IN_TIME)
    came_to(process, 3, (f"texts.jsonl:{TEXTS[fault].count(chr(10))}",))
    assert not process.stdout
    observed(f"exit 3: {told(process)[:140]}")


@pytest.mark.fault("inputs", "orders for the terminal in a text that is answered", expected="unchanged in a pipe")
def test_orders_in_a_pipe(server: Forks, trained: Path, tmp_path: Path, observed: Observed) -> None:
    process = server.run("predict", str(trained), "\x1b[31m好", cwd=tmp_path, timeout=IN_TIME)
    succeeded(process)
    assert process.stdout.rstrip("\n").endswith("\t\x1b[31m好")
    observed("the text as it was given; a terminal gets \\x1b[31m")


def template(content: str) -> Change:
    return text("chat_template.jinja", content)


WELL = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
CODE = "from pathlib import Path\nPath('pwned').touch()\n"


def with_code(base: Path) -> None:
    (base / "evil.py").write_text(CODE, "utf-8")
    settings("config.json", model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(
        base
    )


def tokenizer_with_code(base: Path) -> None:
    (base / "evil.py").write_text(CODE, "utf-8")
    settings("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})(base)


def pickled_base(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def index(name: str) -> Change:
    def change(base: Path) -> None:
        shutil.move(base / "model.safetensors", base.parent / "outside.safetensors")
        (base / "other.safetensors").write_bytes(header(b"{}", b""))
        held = load_file(base.parent / "outside.safetensors")
        named = {key: name.format(base.parent) for key in held}
        text("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": named}))(base)

    return change


def more_tokens(base: Path) -> None:
    content = json.loads((base / "tokenizer.json").read_text("utf-8"))
    last = max(token["id"] for token in content["added_tokens"])
    size = max(last, *content["model"]["vocab"].values())
    token = {**content["added_tokens"][0], "id": size + 1, "content": "手机", "special": False}
    content["added_tokens"].append(token)
    (base / "tokenizer.json").write_text(json.dumps(content), "utf-8")


BASES = [
    Case("a base of pickled weights alone", pickled_base, 4, ("only pickled ones (pytorch_model.bin)",), ("check", "train"), fast=False),
    Case("a base with code of its own", with_code, 4, (), ("check", "train")),
    Case("a tokenizer with code of its own", tokenizer_with_code, 4, (), ("check", "train")),
    Case("a configuration of a base that is a list", text("config.json", "[]"), 4, (), ("check", "train"), fast=False),
    Case("100,000 lists inside each other as a base's configuration", text("config.json", "[" * 100_000), 4, (), ("check", "train"), fast=False),
    Case("a tokenizer.json of nothing", text("tokenizer.json", "{}"), 4, (), ("check",), fast=False),
    Case("a tokenizer with a token that the base has no row for", more_tokens, 4, ("rows of its embedding",), ("train",)),
    Case("weights cut off", lambda base: os.truncate(base / "model.safetensors", 5000), 4, (), ("train",), fast=False),
    Case("shards outside the folder of the base", index("../outside.safetensors"), 4, ("plain names",), ("train",)),
    Case("shards by absolute paths", index("{}/outside.safetensors"), 4, ("plain names",), ("train",), fast=False),
    Case("a template that reaches for Python", template(WELL + "{{ ''.__class__.__mro__[1].__subclasses__() }}"), 3, ("a chat template that takes these messages",), ("check",)),
    Case("a template that calls the system", template("{{ cycler.__init__.__globals__.os.system('touch pwned') }}" + WELL), 3, ("a chat template that takes",), ("check",)),
    Case("a template that loops for ever", template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + WELL), 4, ("short conversations", "takes more"), ("check",), fast=False),
    Case("a template with a range of 10^12", template("{% for i in range(1000000000000) %}{% endfor %}" + WELL), 3, ("Range too big",), ("check",)),
    Case("a template that makes 10 GB of text", template("{{ 'a'.ljust(10000000000) }}" + WELL), 4, ("takes more",), ("check",)),
    Case("a product of 10 GB of text in a template", template("{{ 'a' * 10000000000 }}" + WELL), 4, ("a product",), ("check",), fast=False),
    Case("a power on a condition that no trial meets", template("{% if messages|length > 99 %}{{ (3 ** (messages|length * 999)) is odd }}{% endif %}" + WELL), 4, ("a power, at line 1",), ("check",)),
    Case("a template that doubles a text forty times", template("{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}" + WELL), 4, ("takes more",), ("check",), fast=False),
    Case("a power of a power in a template", template("{{ 10**(10**10) }}" + WELL), 4, ("a power",), ("check",), fast=False),
    Case("a template that does not parse", template("{% for %}"), 3, ("TemplateSyntaxError",), ("check",)),
    Case("a template that asks for the time as it likes", template("{{ strftime_now('%' ~ 'S') }}" + WELL), 4, ("strftime_now",), ("check",)),
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.mark.fault("artefacts", "{fault}", expected="{expected}")
def test_base(
    fault: str, expected: str, case: Case, server: Forks, base: Path, tmp_path: Path, observed: Observed
) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    case.change(own)
    arguments = (str(write_small(tmp_path)), f"base.model={own}", "adapter.embeddings=false")
    seen = []
    for command in case.commands:
        more = ("training.max_steps=1",) if command == "train" else ()
        process = server.run(command, *arguments, *more, cwd=tmp_path, timeout=IN_TIME)
        came_to(process, case.code, case.words)
        assert process.megabytes < 2500
        assert not list(tmp_path.rglob("pwned"))
        assert not list(tmp_path.rglob("adapter"))
        seen.append(f"{command}: exit {process.returncode}")
    observed("; ".join(seen) + f" {told(process)[:140]}")


@pytest.mark.fault("artefacts", "a template that writes today's date", expected="the same prompt on any day")
def test_template_of_today(observed: Observed) -> None:
    llama = '{%- if strftime_now is defined %}{%- set day = strftime_now("%d %b %Y") %}{%- endif %}{{ day }}'
    assert of_one_day(llama) == llama.replace('strftime_now("%d %b %Y")', '"26 Jul 2024"')
    assert of_one_day("{{ strftime_now('%Y-%m-%d') }}") == '{{ "2024-07-26" }}'
    assert of_one_day("{{ strftime_now(format = '%Y') }}") == '{{ "2024" }}'
    assert of_one_day("{{ strftime_now ('%Y') if strftime_now is not defined }}").startswith('{{ "2024" if')
    for other in ("strftime_now(form)", "(strftime_now)('%Y')", "[strftime_now][0]('%Y')"):
        with pytest.raises(ModelError, match="strftime_now"):
            of_one_day(f"{{{{ {other} }}}}")
    with pytest.raises(ModelError, match="strftime_now"):
        of_one_day("{% set f = strftime_now %}{{ f('%Y') }}")
    observed("the 26th of July 2024, which such templates fall back to")


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.fault(
    "artefacts", "a template that loops on some rows, in a thread of the service", expected="stopped by a clock"
)
def test_clock_in_any_thread(observed: Observed) -> None:
    stopped = []

    def render() -> None:
        try:
            with within(0.2):
                ImmutableSandboxedEnvironment().from_string(LOOP).render()
        except TooSlow:
            stopped.append(threading.current_thread() is not threading.main_thread())

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(60)
    assert stopped == [True]
    with within(0.05):
        pass
    time.sleep(0.2)  # the clock of a block that ended raises nothing after it
    observed("TooSlow in that thread, and in no other")


@pytest.mark.fault("artefacts", "a process that stands still while it renders", expected="the time does not count")
def test_clock_that_stands_still(observed: Observed) -> None:
    with within(0.1):
        time.sleep(0.5)  # as a process that was stopped by Ctrl-Z, its thread takes no time of a processor
    observed("rendered on")


@pytest.mark.fault(
    "artefacts", "a process in which templates are tried that does not start", expected="the base is refused"
)
def test_trial_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, observed: Observed) -> None:
    (tmp_path / "jinja2").mkdir()
    (tmp_path / "jinja2" / "__init__.py").write_text("raise ImportError('no jinja2 here')\n", "utf-8")
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])  # which the process gets
    with pytest.raises(ModelError, match=r"(?s)a process in which .* exit code 1: ImportError: no jinja2 here"):
        try_template(WELL, ())
    monkeypatch.undo()
    try_template(WELL, ())
    observed("a ModelError with the last line that it printed")
