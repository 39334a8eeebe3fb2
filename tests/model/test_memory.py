from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ift_peft.model.configuration import skeleton
from ift_peft.model.memory import TRAINED_BYTES, Batch, foresee, weight_bytes
from ift_peft.model.tokenizer import locate_base
from ift_peft.sections import Adapter
from tests.conftest import ROOT, SHARED

GROW = Path(__file__).with_name("grow.py")
CLOSE = 0.1  # what the docstring of Foreseen states


CASES = {"few answers": "tiny,16,200,4", "every position": "tiny,8,128,128", "grouped heads": "{stories},16,400,400"}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, int]]:
    """Foreseen and measured of each case, in processes whose allocator gives memory back at once."""
    stories = SHARED / "models" / "tinystories-260k" / "hf"
    cases = {name: case.format(stories=stories) for name, case in CASES.items() if SHARED.is_dir() or "{" not in case}
    done = subprocess.run(
        [sys.executable, str(GROW), *cases.values()],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line.removeprefix("found ")) for line in done.stdout.splitlines() if line.startswith("found ")]
    return dict(zip(cases, found, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of a process from Linux")
@pytest.mark.parametrize("case", CASES)
def test_steps_take_what_was_foreseen(measured: dict[str, dict[str, int]], case: str) -> None:
    if case not in measured:
        pytest.skip("needs the folder of real data beside the checkout")
    found = measured[case]
    assert found["activations"] + found["logits"] == pytest.approx(found["grown"], rel=CLOSE)


def test_weights_are_counted_as_they_are_loaded() -> None:
    bare = skeleton(locate_base("tiny"))
    parameters = sum(one.numel() for one in bare.parameters())
    plain = weight_bytes(bare, torch.bfloat16, quantization="none", double=True)
    assert plain == 2 * parameters
    sizes = [
        weight_bytes(bare, torch.bfloat16, quantization=kind, double=double)  # type: ignore[arg-type]
        for kind, double in (("nf4", True), ("nf4", False), ("int8", True), ("none", True))
    ]
    assert sizes == sorted(sizes)
    embeddings = 2 * 8192 * 192
    assert sizes[2] == pytest.approx(2 * embeddings + (parameters - embeddings), rel=1e-3)


def test_the_trained_parameters_are_pefts_and_longer_batches_need_more() -> None:
    location = locate_base("tiny")
    small, large = (foresee(location, Adapter(r=4), Batch(2, length, 2), dtype=torch.float32) for length in (32, 128))
    assert small.adapter == large.adapter == 4 * (4 * (4 * 2 * 192 + 3 * (192 + 512)) + 0) * TRAINED_BYTES
    assert 3.9 < large.activations / small.activations < 4.5
    assert large.logits == small.logits
