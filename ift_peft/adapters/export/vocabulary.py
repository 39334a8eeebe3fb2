"""A Hugging Face tokenizer as llama.cpp has it, whose rules are compiled in: only what is known to be the same.

llama.cpp knows how byte-level BPE cuts a text before merging by a name alone (`tokenizer.ggml.pre`). The name is looked
up here by the rules that the tokenizer itself states. Every entry was compared with llama.cpp itself
(tests/adapters/test_gguf_vocabulary.py).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from ift_peft.errors import ExportError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTE_LEVEL = "ByteLevel"  # GPT-2's own expression, inside tokenizers' ByteLevel
_HAN = (  # the built-in base's: Han apart from other letters, as none of its tokens has both
    r"\p{Han}+|'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?[^\W\d_\p{Han}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+(?!\S)|\s+"
)


class _Pre(NamedTuple):
    """llama.cpp's name for a way to cut texts; whether it takes whole pieces before merging; where it differs."""

    name: str
    ignore_merges: bool = False
    differs: tuple[str, ...] = ()


_KNOWN: dict[tuple[str, ...], _Pre] = {
    (_BYTE_LEVEL,): _Pre("gpt-2"),
    ("Digits", _BYTE_LEVEL): _Pre("smollm"),
    (rf"{_WORDS}|\p{{N}}|{_REST}",): _Pre("qwen2"),
    (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",): _Pre("llama-bpe", ignore_merges=True),
    (_HAN,): _Pre(
        "qwen2",
        differs=(
            "white space that ends in a line break and stands before text, if it is two or "
            "more characters long, as a blank line is",
        ),
    ),
}
_NFC = "text that is not in Unicode's normal form NFC, which llama.cpp takes as it is"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer. `differs` names, in words, texts that llama.cpp would split otherwise."""

    model: Literal["gpt2", "llama"]
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    add_space_prefix: bool = False
    differs: tuple[str, ...] = ()
    special: Mapping[str, int] = field(default_factory=dict)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, *, size: int, end_token_id: int) -> Vocabulary:
    """The tokenizer for a model with `size` embeddings, whose answers end in `end_token_id`.

    Raises `ExportError` for every kind of tokenizer that is not known to be the same in llama.cpp.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown("it is no fast tokenizer")
    stored = json.loads(backend.to_str())
    model = stored["model"]
    if model["type"] != "BPE":
        raise _unknown(f"a {model['type']} model")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _unknown("dropout, or marks on parts of words")
    if len(tokenizer) > size:
        raise _unknown(f"{len(tokenizer)} tokens for {size} embeddings")
    special = {"eos": end_token_id}
    for name in ("bos", "pad", "unk"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            special[name] = int(number)
    build = _sentencepiece if model.get("byte_fallback") else _byte_level
    return build(stored, size, special)


def _byte_level(stored: dict[str, Any], size: int, special: Mapping[str, int]) -> Vocabulary:
    model, decoder = stored["model"], stored.get("decoder") or {}
    if decoder.get("type") != "ByteLevel":
        raise _unknown(f"a decoder {decoder.get('type')}")
    rules = _rules(stored.get("pre_tokenizer"))
    known = _KNOWN.get(rules)
    if known is None:
        raise _unknown(f"cutting texts by {' then '.join(rules)!r}")
    if known.ignore_merges != bool(model.get("ignore_merges")):
        raise _unknown(f"ignore_merges={bool(model.get('ignore_merges'))} with the rules of {known.name}")
    differs = list(known.differs)
    normalizer = (stored.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise _unknown(f"a normalizer {normalizer}")
    if normalizer == "NFC":
        differs.append(_NFC)
    tokens, types = _tokens(stored, size)
    merges = [" ".join(_pair(merge)) for merge in model["merges"]]
    return Vocabulary(
        "gpt2", known.name, tokens, types, merges=merges, differs=(*differs, *_flags(stored)), special=special
    )


def _sentencepiece(stored: dict[str, Any], size: int, special: Mapping[str, int]) -> Vocabulary:
    """BPE over characters with bytes for the rest, as sentencepiece makes it: llama.cpp merges by scores."""
    prefix, differs = _space_prefix(stored)
    pairs = [_pair(merge) for merge in stored["model"]["merges"]]
    _check_by_score(pairs, stored["model"]["vocab"])
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, number)
    tokens, types = _tokens(stored, size)
    scores = [-float(rank[token]) if token in rank else 0.0 for token in tokens]
    return Vocabulary(
        "llama",
        "default",
        tokens,
        types,
        scores=scores,
        add_space_prefix=prefix,
        differs=(*differs, *_flags(stored)),
        special=special,
    )


def _rules(pre: dict[str, Any] | None) -> tuple[str, ...]:
    """The expressions by which a text is cut, in order; () for what is not of that kind."""
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return ()
    rules = []
    for step in steps[:-1]:
        if step["type"] == "Split" and "Regex" in step["pattern"]:
            if step["behavior"] != "Isolated" or step.get("invert"):
                return ()
            rules.append(step["pattern"]["Regex"])
        elif step["type"] == "Digits" and step["individual_digits"]:
            rules.append("Digits")
        else:
            return ()
    return (*rules, _BYTE_LEVEL) if steps[-1].get("use_regex", True) else tuple(rules)


def _space_prefix(stored: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether a space goes before each text, and where llama.cpp would put one that the tokenizer does not."""
    normalizer, pre = stored.get("normalizer"), stored.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if pre is None and steps == [{"type": "Prepend", "prepend": "▁"}, spaces]:
        return True, ()
    if pre is None and steps == [spaces]:
        return False, ()
    if not steps and pre is not None and pre["type"] == "Metaspace" and not pre.get("split", True):
        scheme = pre.get("prepend_scheme", "always")
        where = ("text right after a special token, before which llama.cpp puts a space",) if scheme == "first" else ()
        return scheme != "never", where
    raise _unknown(f"spaces made by {normalizer!r} and {pre!r}")


def _check_by_score(pairs: Sequence[tuple[str, str]], vocab: Mapping[str, int]) -> None:
    """Raise where merging by the score of the result is not merging by the rank of the pair."""
    made = defaultdict(set)
    for left, right in pairs:
        made[left + right].add((left, right))
    order = [left + right for left, right in pairs]
    runs = 1 + sum(before != after for before, after in pairwise(order)) if order else 0
    lacking = [
        token
        for token, known in made.items()
        if any(
            token[:at] in vocab
            and token[at:] in vocab
            and (token[:at], token[at:]) not in known
            and _reachable(token[:at], made)
            and _reachable(token[at:], made)
            for at in range(1, len(token))
        )
    ]
    if lacking or runs != len(made):
        found = f"{lacking[0]!r} is not merged from all its parts" if lacking else "merges of one token apart"
        raise _unknown(found)


def _reachable(token: str, made: Mapping[str, Any]) -> bool:
    """Whether merging ever comes by this piece: one character, or made by a merge."""
    return len(token) == 1 or token in made


def _tokens(stored: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """All `size` tokens and their kinds; numbers that the tokenizer leaves free are unused ones."""
    from gguf import TokenType

    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [int(TokenType.UNUSED)] * size
    sentencepiece = bool(stored["model"].get("byte_fallback"))
    for token, number in stored["model"]["vocab"].items():
        is_byte = sentencepiece and len(token) == 6 and token.startswith("<0x")
        tokens[number], types[number] = token, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in stored.get("added_tokens", []):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if sentencepiece and added["content"] == stored["model"].get("unk_token"):
            kind = TokenType.UNKNOWN
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    return tokens, types


def _flags(stored: dict[str, Any]) -> tuple[str, ...]:
    flagged = [
        added["content"]
        for added in stored.get("added_tokens", [])
        if added["lstrip"] or added["rstrip"] or added["single_word"]
    ]
    return (f"white space beside {', '.join(flagged)}",) if flagged else ()


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _unknown(found: str) -> ExportError:
    return ExportError(
        expected="a tokenizer that llama.cpp is known to have as well",
        found=found,
        fix="export --to merged and convert it by llama.cpp's own scripts, if they know this base",
    )
