"""How texts are written: characters that do not belong into text, wrongly decoded text, and the language."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

from ftfy.badness import BADNESS_RE

_SUSPECT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff"
    "\ufdd0-\ufdef\ufffd-\uffff\ue000-\uf8ff\ud800-\udfff\U000f0000-\U0010ffff]"
)
_JOINERS = "\u200c\u200d"  # part of emoji, and of words in Persian and Indian scripts
_MARKERS = re.compile("锟斤拷|烫烫烫|屯屯屯")  # replacement characters and unset memory, read as GBK
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
# Three Chinese characters in UTF-8. In the bytes of rightly decoded Chinese, written as GBK, they hardly ever occur.
_UTF_8_CHINESE = re.compile(rb"(?:[\xe4-\xe9][\x80-\xbf]{2}|\xe3\x80[\x80-\xbf]|\xef\xbc[\x80-\xbf]){3}")
_LATIN_1 = re.compile("[\u00a0-\u00ff]{4,}")

MIN_LETTERS = 6
LETTER_WEIGHT = 1 / 3  # a Chinese character says about as much as three letters
_DENSE = ("Han", "Hangul", "Japanese")
_LANGUAGE = {"Han": "zh", "Latin": "en"}


def bad_characters(text: str) -> tuple[str, int] | None:
    """What is wrong with the first character, or sequence of them, that does not belong into text, and where it is."""
    for match in _SUSPECT.finditer(text):
        at = match.start()
        if not (text[at] in _JOINERS and _may_be_joined(text, at)):
            return f"{_name(text[at])} U+{ord(text[at]):04X}", at
    return wrongly_decoded(text)


def _may_be_joined(text: str, at: int) -> bool:
    """Whether a joiner stands between two characters of emoji or of scripts that use it."""
    return 0 < at < len(text) - 1 and all(
        unicodedata.category(neighbour) in ("So", "Sk", "Mn", "Mc", "Lo") and not _HAN.match(neighbour)
        for neighbour in (text[at - 1], text[at + 1])
    )


def _name(character: str) -> str:
    point = ord(character)
    if point == 0xFFFD:
        return "replacement character"
    if point == 0xFEFF:
        return "byte order mark"
    by_category = {"Cc": "control character", "Cf": "invisible character", "Co": "private use character"}
    if 0xD800 <= point <= 0xDFFF:
        return "half of a surrogate pair"
    return by_category.get(unicodedata.category(character), "character outside of Unicode")


def wrongly_decoded(text: str) -> tuple[str, int] | None:
    """Where text was decoded as something that it was not written in."""
    if text.isascii():
        return None
    marker = _MARKERS.search(text)
    if marker is not None:
        return f"{marker.group()!r}, which wrong decoding leaves", marker.start()
    for match in _LATIN_1.finditer(text):
        letters = sum(map(str.isalpha, match.group()))  # a row of dots is none
        if 2 * letters >= len(match.group()) and _is_chinese_in_gbk(match.group()):
            return "GBK that was read as Latin-1", match.start()
    bad = BADNESS_RE.search(text)
    if bad is not None:
        return "UTF-8 that was read as another encoding", bad.start()
    stored = text.encode("gb18030", "ignore")
    utf_8 = _UTF_8_CHINESE.search(stored)
    if utf_8 is not None:
        return "UTF-8 that was read as GBK", len(stored[: utf_8.start()].decode("gb18030", "ignore"))
    return None


def _is_chinese_in_gbk(text: str) -> bool:
    """Whether Latin-1 characters are Chinese in their bytes, but for an odd one at the end."""
    chinese = text.encode("latin-1").decode("gb18030", "replace").rstrip("\ufffd")
    return len(_HAN.findall(chinese)) >= 0.8 * len(chinese) > 0


def language_of(text: str) -> str | None:
    """`zh`, `en`, or the name of another script that most of the text is in; None for a text with too few letters.

    It is the script that is looked at: any language in Latin letters passes for English.
    """
    letters = Counter(script for script in map(_script, text) if script)
    if sum(letters.values()) < MIN_LETTERS and not letters["Han"] >= MIN_LETTERS // 2:
        return None
    kana = letters.pop("Hiragana", 0) + letters.pop("Katakana", 0)
    if kana * 4 > letters["Han"]:  # Japanese is a mixture of both
        letters["Japanese"] = kana + letters.pop("Han", 0)
    weights = {script: count * (1 if script in _DENSE else LETTER_WEIGHT) for script, count in letters.items()}
    script = max(weights, key=lambda name: weights[name])
    return _LANGUAGE.get(script, script)


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    """The script of a letter by the first word of its name, empty for anything else."""
    if not character.isalpha():
        return ""
    if _HAN.match(character):
        return "Han"
    name = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    word = name.partition(" ")[0].capitalize()
    return "Han" if word == "Cjk" else word
