"""Too little memory, in a step and before, and too little room for what is kept of rows."""

from __future__ import annotations

import json
import tempfile
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ift_peft.data.render import Renderer
from ift_peft.data.row import Message
from ift_peft.data.template_choice import choose_template
from ift_peft.errors import OutOfMemory
from ift_peft.model.tokenizer import TINY
from ift_peft.plain_files import MiB
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir, runs_called
from ift_peft.train.run import train
from tests.conftest import Ift
from tests.faults.conftest import Observed
from tests.faults.forks import Forks
from tests.faults.trained import fill, mounted, said, succeeded
from tests.train.scarce import OutOfRows, Telling
from tests.train.small import small, write_small


def the_run(folder: Path) -> RunDir:
    return runs_called(folder / "runs", "small")[0]


@pytest.mark.fault(
    "endings",
    "no memory for more than 1 of 4 rows at a time, from step 3 on",
    expected="the same losses and weights as with memory, told, recorded; 10 steps",
)
def test_halved_micro_batches_learn_the_same(tmp_path: Path, observed: Observed) -> None:
    recipe = small(
        tmp_path, "adapter.lora_dropout=0", "training.max_steps=10", "training.gradient_accumulation_steps=2"
    )
    whole = train(recipe, root=tmp_path / "whole", reporter=Silent())
    scarce, told = OutOfRows(1, since=2), Telling()
    cut = train(recipe, root=tmp_path / "cut", reporter=told, callbacks=[scarce])
    warned = [note for note in told.notes if "out of memory" in note]
    assert scarce.refused == 2 and len(warned) == 2
    assert warned[0].startswith("warning: out of memory with 4 rows at a time at step 3; from here on 2 rows")
    assert cut.read("manifest.json")["micro_batch"] == {
        "rows_at_once": 1,
        "since_step": 3,
        "drawn_otherwise": [],
    }
    assert cut.read("manifest.json")["order_sha256"] == whole.read("manifest.json")["order_sha256"]
    ours, theirs = (run.read_lines("metrics.jsonl") for run in (cut, whole))
    assert len(ours) == 10
    for name in ("loss", "grad_norm", "mean_token_accuracy"):
        assert [one[name] for one in ours] == pytest.approx([one[name] for one in theirs], rel=1e-4)
    weights, others = (load_file(run.adapter / "adapter_model.safetensors") for run in (cut, whole))
    worst = max(float((weights[name] - others[name]).abs().max()) for name in others)
    assert worst < 1e-4
    observed(f"{cut.status}: {warned[0].removeprefix('warning: ')}; weights differ by {worst:.0e} at most")


@pytest.mark.fault(
    "endings", "no memory for a single row", expected="out of memory, exit code 13, told what to lower", rare=True
)
def test_one_row_that_does_not_fit_is_told(tmp_path: Path, observed: Observed) -> None:
    with pytest.raises(OutOfMemory, match="one row at a time at step 1") as caught:
        train(small(tmp_path), root=tmp_path / "runs", reporter=Silent(), callbacks=[OutOfRows(0)])
    run = the_run(tmp_path)
    assert run.status == "out_of_memory" and caught.value.exit_code == 13 and not run.adapter.exists()
    assert "training.max_length" in caught.value.fix
    observed(f"{run.status}, exit code 13: {caught.value.fix}")


@pytest.mark.fault("endings", "adapter.r=100000000", expected="exit code 13 before a run folder exists")
def test_an_adapter_larger_than_memory_is_told(tmp_path: Path, ift: Ift, observed: Observed) -> None:
    write_small(tmp_path)
    ended = ift("train", "small.yaml", "adapter.r=100000000")
    assert ended.returncode == 13 and not (tmp_path / "runs").exists()
    assert "expected memory for the adapter" in ended.stderr and "Traceback" not in ended.stderr
    assert "lower adapter.r" in ended.stderr
    observed("exit code 13, no run folder: expected memory for the adapter, lower adapter.r")


@pytest.mark.fault(
    "endings",
    "no memory for all rows of a step together, which the system refuses (RLIMIT_AS)",
    expected="it succeeds with fewer at a time, told and recorded",
)
def test_memory_that_the_system_refuses_in_a_step(tmp_path: Path, server: Forks, observed: Observed) -> None:
    write_small(tmp_path)
    rows = [json.dumps({"text": "很好，" * 120 + str(n), "label": "正面"}, ensure_ascii=False) for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    settings = ("training.per_device_train_batch_size=16", "training.max_steps=1")
    process = server.run(  # 16 rows take half a gigabyte, one takes less than an earlier step left
        *(str(160 * MiB), "train", "small.yaml", *settings),
        cwd=tmp_path,
        target="tests.faults.terminals:with_little_memory",
    )
    succeeded(process)
    said(process, "out of memory with 16 rows at a time at step 1")
    micro_batch = the_run(tmp_path).read("manifest.json")["micro_batch"]
    assert micro_batch["rows_at_once"] in (1, 2, 4, 8) and micro_batch["since_step"] == 1
    said(process, f"from here on {micro_batch['rows_at_once']} row")
    observed(f"succeeded with {micro_batch['rows_at_once']} of 16 rows at a time, told and recorded")


@pytest.mark.fault(
    "endings",
    "no room for the token ids of rows: in the cache, then for temporary files as well (a small tmpfs)",
    expected="they are made in the temporary folder, told and recorded; then exit code 12 before a run folder exists",
)
def test_a_full_cache_is_gone_on_without(
    tmp_path: Path, ift: Ift, monkeypatch: pytest.MonkeyPatch, observed: Observed
) -> None:
    write_small(tmp_path)
    with mounted(tmp_path / "disk", mebibytes=1) as disk:
        monkeypatch.setenv("IFT_PEFT_CACHE", str(disk))
        fill(disk, but=8192)
        ended = ift("train", "small.yaml", "training.max_steps=1")
        assert ended.returncode == 0, ended.stderr
        run = the_run(tmp_path)
        (note,) = [one for one in run.read("manifest.json")["notes"] if "token ids" in one]
        assert "the cache cannot be written" in note and "No space left on device" in note
        assert note.split("(")[0] in " ".join(ended.stderr.split())
        assert {path.name for path in disk.rglob("*")} == {"ballast", "rendered"}
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        full = ift("train", "small.yaml", "training.max_steps=1", "--runs-dir", "others")
        assert full.returncode == 12 and "Traceback" not in full.stderr, full.stderr
        assert "room for the token ids" in " ".join(full.stderr.split()) and not (tmp_path / "others").exists()
        assert {path.name for path in disk.rglob("*")} == {"ballast", "rendered"}
    observed(f"“{note}”, {run.status}; exit code {full.returncode}, no folder")


def test_no_memory_for_the_clock_of_a_template_is_no_fault_of_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    renderer = Renderer(tokenizer)
    tokenizer.chat_template = (
        str(tokenizer.chat_template).replace("{% generation %}", "").replace("{% endgeneration %}", "")
    )
    assert choose_template(tokenizer)

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    messages: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "好"}]
    with pytest.raises(OutOfMemory, match="new thread"):
        renderer.render([messages])
    with pytest.raises(OutOfMemory, match="new thread"):  # not taken for a template that TRL has no marked version of
        choose_template(tokenizer)
