"""The built-in base, as the tests of this folder ask it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ift_peft.data.render import Renderer
from ift_peft.model.tokenizer import TINY


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(TINY))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    return loaded
