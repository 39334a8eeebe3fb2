"""Wrong merges, planted in what is written, whatever the adapter and however small: each is caught, nothing is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor

from ift_peft.adapters import merge as merging
from ift_peft.adapters.checkpoint import reading
from ift_peft.adapters.merge import merge
from ift_peft.adapters.plan import Plan, Weight
from ift_peft.adapters.shards import write_merged
from ift_peft.errors import MergeError
from ift_peft.infer.load import open_parts
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from tests.e2e.test_families import FAMILIES, trained, write_base

pytestmark = pytest.mark.slow

SMALL = 1e-5  # of an adapter that changes logits by less than the bound on them
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Over a tied base, quantised."""
    folder = tmp_path_factory.mktemp("planted")
    base = write_base(folder / "base", FAMILIES["qwen3, tied"]())
    return trained(folder, base, "base.quantization=nf4")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Over a tied base whose embedding is adapted, so that its head gets weights of its own."""
    folder = tmp_path_factory.mktemp("untied")
    return trained(folder, write_base(folder / "base", FAMILIES["qwen3, tied"]()), "adapter.embeddings=true")


def with_adapter(run: RunDir, folder: Path, *, seed: int, size: float) -> RunDir:
    """A copy of `run` with its adapter drawn anew."""
    shutil.copytree(run.path, folder)
    copy = RunDir(folder)
    file = copy.adapter / "adapter_model.safetensors"
    torch.manual_seed(seed)
    tensors = {
        key: torch.randn_like(tensor) * (0.1 * size if "_B" in key else 0.3) for key, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    copy.update_manifest(adapter_sha256=copy.adapter_hashes())
    return copy


def base_of(weight: Weight) -> Tensor:
    assert weight.stored is not None
    with reading() as read:
        return read(weight.stored.file, weight.stored.key).float().clone()


def adapted(plan: Plan) -> list[Weight]:
    return [weight for weight in plan.weights if weight.adapted]


def requantised(plan: Plan, tensors: Tensors, folder: Path, seed: int) -> None:
    for weight in adapted(plan):
        packed, state = quantize_4bit(tensors[weight.key], quant_type="nf4")
        tensors[weight.key] = dequantize_4bit(packed, state)


def unscaled(plan: Plan, tensors: Tensors, folder: Path, seed: int) -> None:
    for weight in adapted(plan):
        scaling = plan.model.get_submodule(str(weight.layer)).scaling["default"]
        assert scaling != 1.0
        base = base_of(weight)
        tensors[weight.key] = base + (tensors[weight.key] - base) / scaling


def one_skipped(plan: Plan, tensors: Tensors, folder: Path, seed: int) -> None:
    weight = adapted(plan)[seed % len(adapted(plan))]
    tensors[weight.key] = base_of(weight)


def tie_broken(plan: Plan, tensors: Tensors, folder: Path, seed: int) -> None:
    """The head gets weights of its own, which are nearly the embedding's."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "tie_word_embeddings": False}), "utf-8")
    torch.manual_seed(seed)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding * (1 + 1e-5 * torch.randn_like(embedding))


def tied_again(plan: Plan, tensors: Tensors, folder: Path, seed: int) -> None:
    """The head follows the embedding that the adapter changed."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "tie_word_embeddings": True}), "utf-8")
    del tensors["lm_head.weight"]


Fault = Callable[[Plan, Tensors, Path, int], None]


def plant(fault: Fault, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(plan: Plan, folder: Path, **how: Any) -> None:
        write_merged(plan, folder, **how)
        tensors = load_file(folder / "model.safetensors")
        fault(plan, tensors, folder, seed)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merging, "write_merged", write)


@pytest.mark.parametrize("size", [1.0, SMALL])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", [requantised, unscaled, one_skipped, tie_broken, tied_again])
def test_a_wrong_merge_is_caught_every_time(
    fault: Fault,
    seed: int,
    size: float,
    run: RunDir,
    untied: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = with_adapter(untied if fault is tied_again else run, tmp_path / "run", seed=seed, size=size)
    plant(fault, seed, monkeypatch)
    with pytest.raises(MergeError, match="a difference of"):
        merge(open_parts(copy), output=tmp_path / "out" / "merged", dtype="float32", reporter=Silent())
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("dtype", "size"), [("float32", SMALL), ("bfloat16", 1.0)])
@pytest.mark.parametrize("which", ["run", "untied"])
def test_a_right_merge_passes_and_says_how_many_weights_were_checked(
    which: str, dtype: str, size: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Over the same adapters, so that the faults above are what is refused."""
    copy = with_adapter(request.getfixturevalue(which), tmp_path / "run", seed=0, size=size)
    merge(open_parts(copy), output=tmp_path / "merged", dtype=dtype, reporter=Silent())
    written = json.loads((tmp_path / "merged" / "certificate.json").read_text("utf-8"))["written"]
    # Two layers of 7 linear modules and 4 norms, the last norm, the embedding and the head.
    assert written["weights_checked"] == 2 * (7 + 4) + 3


def test_the_float32_logits_alone_do_not_show_a_small_adapters_lost_layer(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why every weight is checked."""
    copy = with_adapter(run, tmp_path / "run", seed=1, size=SMALL)
    plant(one_skipped, 1, monkeypatch)
    monkeypatch.setattr(merging, "check_weights", lambda *arguments, **options: 0)
    assert merge(open_parts(copy), output=tmp_path / "merged", dtype="float32", reporter=Silent())
