"""The held-out rows on which an adapter gained most over its base, and those on which it lost most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ift_peft.data.row import language_of

SHOWN = 5
WHO = ("base", "adapter")
LONGEST = 500  # characters of a text that are shown


@dataclass(frozen=True)
class Text:
    """A piece of the user's data; `lang` is empty where the language is not known."""

    text: str
    cut: int = 0
    """How many characters are not shown."""

    @property
    def lang(self) -> str:
        kana_or_hangul = any("\u3040" <= one <= "\u30ff" or "\uac00" <= one <= "\ud7af" for one in self.text)
        return "zh" if language_of(self.text) == "zh" and not kana_or_hangul else ""


@dataclass(frozen=True)
class Side:
    """What one model made of a row: its answer where there is one, and how likely it held the reference."""

    answer: Text | None
    likelihood: str
    remark: str = ""


@dataclass(frozen=True)
class Example:
    text: Text
    reference: Text
    base: Side
    adapter: Side
    gain: float


@dataclass(frozen=True)
class Examples:
    """Rows by what the adapter gained, the most first, and by what it lost; `measure` says of what."""

    measure: str
    gained: tuple[Example, ...]
    lost: tuple[Example, ...]


def cut(text: str, *, longest: int = LONGEST) -> Text:
    """The beginning of a long text."""
    return Text(text) if len(text) <= longest else Text(text[:longest], cut=len(text) - longest)


def examples(rows: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]) -> Examples | None:
    """The rows of test.jsonl that predictions.jsonl moved most; None without predictions.

    The gain of a label is in its probability, that of an answer in its log-likelihood per token.
    """
    if not lines:
        return None
    answers = any("log_probability" in line.get("likelihood", line)["adapter"] for line in lines)
    measure = (
        "log-likelihood of the reference, nats per token"
        if answers
        else "probability of the right label among the labels"
    )
    found = [_example(rows, line, answers=answers) for line in lines]
    by_gain = sorted(found, key=lambda one: -one.gain)
    gained = tuple(one for one in by_gain[:SHOWN] if one.gain > 0)
    lost = tuple(one for one in reversed(by_gain[-SHOWN:]) if one.gain < 0)
    return Examples(measure, gained, lost)


def _example(rows: Sequence[Mapping[str, Any]], line: Mapping[str, Any], *, answers: bool) -> Example:
    row = rows[line["row"]]
    asked = row.get("text")
    if asked is None:
        asked = next((one["content"] for one in reversed(row["messages"]) if one["role"] == "user"), "")
    # In a mix a row with labels also has the likelihood of its answer, by which all rows are set side by side.
    scores = [_likelihood(line.get("likelihood", line)[who], line["answer"], answers=answers) for who in WHO]
    base, adapter = (_side(line[who], line["answer"], score) for who, score in zip(WHO, scores, strict=True))
    return Example(cut(str(asked)), cut(line["answer"]), base, adapter, gain=scores[1] - scores[0])


def _likelihood(part: Mapping[str, Any], reference: str, *, answers: bool) -> float:
    if answers:
        return float(part["log_probability"]) / max(1, int(part["tokens"]))
    return float(part.get(reference, 0.0))


def _side(part: Mapping[str, Any], reference: str, score: float) -> Side:
    shown = f"{score:.2f}".replace("-", "\N{MINUS SIGN}")
    if "log_probability" not in part:
        chosen = max(part, key=part.__getitem__)
        return Side(Text(chosen), shown, "right" if chosen == reference else "wrong")
    texts = part.get("texts") or ([part["text"]] if "text" in part else [])
    tried = f"{part['passed']} of {len(texts)} passed" if "passed" in part else ""
    return Side(cut(texts[0]) if texts else None, shown, tried)
