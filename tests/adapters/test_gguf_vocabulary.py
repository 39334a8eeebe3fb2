"""Tokenizers in GGUF: those known to be the same in llama.cpp are, on real ones; others are refused."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from ift_peft.adapters.export.proof import PROBES, available, running, split
from ift_peft.adapters.export.vocabulary import vocabulary_of
from ift_peft.errors import ExportError
from ift_peft.model.tokenizer import TINY
from ift_peft.reporter import Silent
from tests.conftest import ROOT

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
in_llama_cpp = pytest.mark.skipif(
    not available(), reason="not compared with llama.cpp: needs the extra gguf-proof (llama-cpp-python)"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def shipped_texts(most: int) -> list[str]:
    """Texts of the rows that come with recipes: Chinese, English, code."""
    found: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                collect(part)

    for file in sorted((ROOT / "recipes" / "data").glob("*/t*.jsonl")):
        for line in file.read_text("utf-8").splitlines()[:most]:
            collect(json.loads(line))
    return found


@contextmanager
def in_a_file(tokenizer: Any, folder: Path) -> Iterator[Any]:
    """The tokenizer in llama.cpp, in the file of a model with weights of no meaning."""
    from ift_peft.adapters.export.gguf_file import About, write_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    write_model(
        folder / "model",
        folder / "model.gguf",
        vocabulary=vocabulary_of(tokenizer, size=len(tokenizer), end_token_id=0),
        template="{{ messages[0].content }}",
        outtype="f16",
        about=About("none", "", "none", None, None, "none"),
        reporter=Silent(),
    )
    with running(folder / "model.gguf", room=512) as llama:
        yield llama


def tiny(_: Path) -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def stories(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared / "models/tinystories-260k/hf")


def qwen2(shared: Path) -> Any:
    folder = shared / "tokenizers/qwen2"
    return Qwen2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


def gpt2(shared: Path) -> Any:
    folder = shared / "tokenizers/gpt2"
    return GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


def minimind(shared: Path) -> Any:
    return PreTrainedTokenizerFast(tokenizer_file=str(shared / "tokenizers/minimind/tokenizer.json"))


def pythia(shared: Path) -> Any:
    return PreTrainedTokenizerFast(tokenizer_file=str(shared / "tokenizers/pythia/tokenizer.json"))


def llama3_rules(shared: Path) -> Any:
    """Llama 3's way to cut texts, with Qwen's pieces."""
    stored = json.loads(qwen2(shared).backend_tokenizer.to_str())
    stored["normalizer"], stored["model"]["ignore_merges"] = None, True
    backend = Tokenizer.from_str(json.dumps(stored))
    cut = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def smollm_rules(shared: Path) -> Any:
    """SmolLM's way to cut texts, with GPT-2's pieces."""
    backend = Tokenizer.from_str(gpt2(shared).backend_tokenizer.to_str())
    cut = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


REAL = (stories, qwen2, gpt2, minimind, pythia, llama3_rules, smollm_rules)


@in_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("make", REAL)
def test_llama_cpp_splits_as_the_tokenizer_does(make: Callable[[Path], Any], shared: Path, tmp_path: Path) -> None:
    tokenizer = make(shared)
    texts = [text for text in (*PROBES, *shipped_texts(40)) if unicodedata.is_normalized("NFC", text)]
    with in_a_file(tokenizer, tmp_path) as llama:
        for text in texts:
            assert split(llama, text) == tokenizer(text, add_special_tokens=False)["input_ids"], text


@in_llama_cpp
@pytest.mark.slow
def test_the_built_in_base_differs_where_it_is_said_to_and_nowhere_else(tmp_path: Path) -> None:
    tokenizer = tiny(tmp_path)
    said = re.compile(r"\s[\r\n](?=\S)")
    texts = [*PROBES, *shipped_texts(400), "<|user|>一 \n二<|end|><|assistant|>", "a\n\nb", "a.\n\nb"]
    unequal = []
    with in_a_file(tokenizer, tmp_path) as llama:
        for text in texts:
            if split(llama, text) != tokenizer(text, add_special_tokens=False)["input_ids"]:
                unequal.append(text)
    assert "a\n\nb" in unequal
    assert [text for text in unequal if not said.search(text)] == []


def test_scores_put_merges_in_the_order_of_their_ranks(shared: Path) -> None:
    tokenizer = stories(shared)
    found = vocabulary_of(tokenizer, size=512, end_token_id=2)
    assert found.model == "llama" and found.add_space_prefix and found.scores is not None
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    scores = [found.scores[found.tokens.index("".join(merge))] for merge in merges]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len({"".join(merge) for merge in merges})
    assert found.types[found.tokens.index("<0x0A>")] == gguf.TokenType.BYTE
    assert found.types[found.tokens.index("<s>")] == gguf.TokenType.CONTROL


def test_numbers_without_a_token_are_unused_ones(tmp_path: Path) -> None:
    found = vocabulary_of(tiny(tmp_path), size=8200, end_token_id=4)
    assert len(found.tokens) == 8200
    assert set(found.types[8192:]) == {int(gguf.TokenType.UNUSED)}
    assert found.special == {"eos": 4, "pad": 0}


def changed(**parts: Any) -> PreTrainedTokenizerFast:
    """The built-in tokenizer with parts of its file replaced."""
    stored = json.loads((TINY / "tokenizer.json").read_text("utf-8"))
    for name, value in parts.items():
        if name == "model":
            stored["model"] |= value
        else:
            stored[name] = value
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(stored)))


def split_by(pattern: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [cut, level]}


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"pre_tokenizer": split_by(r"\s+|\S+")}, "cutting texts by"),
        ({"pre_tokenizer": split_by(LLAMA3)}, "ignore_merges=False"),
        ({"normalizer": {"type": "Lowercase"}}, "a normalizer Lowercase"),
        ({"model": {"dropout": 0.1}}, "dropout"),
        ({"model": {"byte_fallback": True}}, "spaces made by"),
    ],
)
def test_what_is_not_known_is_refused_by_name(parts: dict[str, Any], named: str) -> None:
    with pytest.raises(ExportError, match=re.escape(named)):
        vocabulary_of(changed(**parts), size=8192, end_token_id=4)


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="8192 tokens for 8000"):
        vocabulary_of(tiny(tmp_path), size=8000, end_token_id=4)


def test_sentencepiece_merges_that_scores_cannot_say_are_refused(shared: Path) -> None:
    """`abc` made of a + bc only, though ab and c are pieces: llama.cpp would make it of those too."""
    stored = json.loads((shared / "models/tinystories-260k/hf/tokenizer.json").read_text("utf-8"))
    for piece in ("ab", "bc", "abc"):
        stored["model"]["vocab"][piece] = len(stored["model"]["vocab"])
    stored["model"]["merges"] += [["a", "b"], ["b", "c"], ["a", "bc"]]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(stored)))
    with pytest.raises(ExportError, match="'abc' is not merged from all its parts"):
        vocabulary_of(tokenizer, size=600, end_token_id=2)
