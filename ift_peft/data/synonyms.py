"""Lexicons of synonyms, Chinese and English, in several file forms told apart by their content."""

from __future__ import annotations

import errno
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ift_peft.data.protection import HAN, NEGATION
from ift_peft.errors import DataError, first_line
from ift_peft.plain_files import MiB, read_text

BUILTIN = "builtin"
_LARGEST = 1024 * MiB
_FOLDER = Path(__file__).resolve().parent / "lexicon"
_PARTS = ("noun", "verb", "adj", "adv", "phrase")
_HAN_WORD = re.compile(f"[{HAN}]+")
_LATIN_WORD = re.compile("[a-z]+(?:['-][a-z]+)*")

_CILIN_LINE = re.compile(r"([A-L])[a-z]\d\d[A-Z]\d\d([=#@])\s+(\S.*)")
_CILIN_PARTS = {
    **dict.fromkeys("ABCD", "noun"),
    "E": "adj",
    **dict.fromkeys("FGHIJ", "verb"),
}
_WORDNET_PARTS = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
_TSV_LINE = re.compile(rf"({'|'.join(_PARTS)})\t\S")


class Group(NamedTuple):
    """Words that stand for one another, and their part of speech where the lexicon gives one."""

    part: str | None
    words: tuple[str, ...]


@dataclass(frozen=True)
class Lexicon:
    """The one group of every word that can be replaced, by language."""

    zh: Mapping[str, Group]
    en: Mapping[str, Group]


class _Reading(NamedTuple):
    """The groups of one file, and every sense of each word in it, also those without a synonym."""

    groups: list[Group]
    senses: Counter[str]


def load_lexicon(names: Sequence[str]) -> Lexicon:
    """The synonyms of `builtin`, and of files in one of three forms:

    - Cilin: `Aa01A01= 人 士 人物`. Only codes that end in `=` list synonyms; the words of `#` are merely related.
    - WordNet: JSONL with `id`, `pos` (n v a s r) and `members`.
    - that of the builtin lexicon: part of speech (noun verb adj adv phrase), tab, words parted by spaces.

    A word in more than one group of a lexicon is ambiguous, and is left out there: which sense a text means is not
    known. So are words of a Cilin with a second code of any kind, words in several WordNet synsets or parts of speech,
    words that hold a negation, names, and words of several words or scripts. A file that lists only some of the senses
    of a word cannot show that it is ambiguous. A word takes its group from the first lexicon that has it.

    Raises `DataError` for a file that is missing or in none of these forms.
    """
    zh: dict[str, Group] = {}
    en: dict[str, Group] = {}
    known: set[str] = set()
    for name in names:
        files = sorted(_FOLDER.glob("*.tsv")) if name == BUILTIN else [Path(name)]
        readings = [_read(path) for path in files]
        for reading in readings:
            for word, group in _unambiguous(reading):
                if word not in known:
                    (zh if _HAN_WORD.fullmatch(word) else en)[word] = group
        for reading in readings:
            known.update(reading.senses)
    return Lexicon(zh, en)


def _unambiguous(reading: _Reading) -> Iterator[tuple[str, Group]]:
    for part, words in reading.groups:
        kept = tuple(word for word in words if reading.senses[word] == 1 and _usable(word))
        for script in (_HAN_WORD, _LATIN_WORD):
            group = Group(part, tuple(word for word in kept if script.fullmatch(word)))
            if len(group.words) > 1:
                yield from ((word, group) for word in group.words)


def _usable(word: str) -> bool:
    whole = _HAN_WORD.fullmatch(word) or _LATIN_WORD.fullmatch(word)
    return whole is not None and NEGATION.search(word) is None


def _read(path: Path) -> _Reading:
    try:
        lines = read_text(path, most=_LARGEST).splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            expected="a lexicon in UTF-8",
            found=f"byte {error.object[error.start]:#04x} in {path}",
            fix="save the file as UTF-8 (iconv -f GB18030 -t UTF-8 turns most Chinese files into it)",
        ) from None
    except OSError as error:
        raise DataError(
            expected="lexicons to name files, or builtin",
            found=first_line(error),
            fix="check the path; a recipe's is relative to its file, an override's to the working directory"
            if error.errno != errno.EFBIG
            else "split the lexicon, and list its parts",
        ) from None
    if next((line for line in lines if line.strip()), "").startswith("{"):
        return _read_wordnet(path, lines)
    if any(_CILIN_LINE.match(line) for line in lines):
        return _read_cilin(lines)
    if any(_TSV_LINE.match(line) for line in lines):
        return _read_tsv(path, lines)
    raise DataError(
        expected="a lexicon: Cilin (Aa01A01= 人 士 …), WordNet (JSONL with pos and members), or pos<TAB>word word …",
        found=f"lines of none of these in {path}",
        fix="name another file, or write it in one of these forms",
    )


def _reading(groups: Iterable[Group], others: Iterable[Sequence[str]] = ()) -> _Reading:
    listed = [group._replace(words=tuple(dict.fromkeys(group.words))) for group in groups]
    senses = Counter(word for group in listed for word in group.words)
    for words in others:
        senses.update(set(words))
    return _Reading(listed, senses)


def _read_cilin(lines: Iterable[str]) -> _Reading:
    groups, others = [], []
    for line in lines:
        found = _CILIN_LINE.match(line)
        if found is None:  # headings of chapters
            continue
        words = tuple(found[3].split())
        if found[2] == "=":
            groups.append(Group(_CILIN_PARTS.get(found[1]) or ("adv" if line.startswith("Ka") else None), words))
        else:
            others.append(words)
    return _reading(groups, others)


def _read_wordnet(path: Path, lines: Iterable[str]) -> _Reading:
    groups = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        part, members = _synset(line, f"{path}:{number}")
        # Senses are counted without regard to capitals: a word that is also a name is ambiguous.
        names = {member.lower() for member in members if member != member.lower()}
        groups.append(Group(part, tuple(member for member in members if member not in names)))
        if names:
            groups.append(Group(part, tuple(names)))
    return _reading(groups)


def _synset(line: str, where: str) -> tuple[str, list[str]]:
    try:
        values: Any = json.loads(line)
    except ValueError as error:
        raise DataError(
            expected="one JSON object a line", found=f"{error} at {where}", fix="repair or remove the line"
        ) from None
    part = _WORDNET_PARTS.get(str(values.get("pos"))) if isinstance(values, dict) else None
    members = values.get("members") if isinstance(values, dict) else None
    if part is None or not isinstance(members, list) or not all(isinstance(member, str) for member in members):
        raise DataError(
            expected="a synset with pos (n v a s r) and a list of members",
            found=f"{line.strip()[:60]} at {where}",
            fix="repair or remove the line",
        )
    return part, members


def _read_tsv(path: Path, lines: Iterable[str]) -> _Reading:
    groups = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        part, tab, words = line.partition("\t")
        if part not in _PARTS or not tab or not words.split():
            raise DataError(
                expected=f"one of {', '.join(_PARTS)}, a tab, and words",
                found=f"{line[:60]!r} at {path}:{number}",
                fix="repair or remove the line",
            )
        groups.append(Group(part, tuple(words.split())))
    return _reading(groups)
