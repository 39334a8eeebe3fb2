"""Texts changed without changing what they say: synonyms and slips of the hand, drawn anew for every key."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from functools import cached_property

from ift_peft.data.noise import noised
from ift_peft.data.protection import LATIN_WORD, Token, mask_of, pattern_of, signature, tokens_of
from ift_peft.data.row import Row, language_of
from ift_peft.data.synonyms import Group, Lexicon, load_lexicon
from ift_peft.errors import DataError
from ift_peft.sections import Augment, Perturbation

ATTEMPTS = 5
"""How often a copy is drawn again that equals a text there is already."""
_NOISE_ATTEMPTS = 4

_TAGS = {"noun": "n", "verb": "v", "adj": "a", "adv": "d", "phrase": "l", None: "n"}
_AGREEING = {
    "noun": ("n", "t", "f", "s", "vn", "an"),
    "verb": ("v",),
    "adj": ("a", "b", "z", "v", "i", "l"),  # many adjectives are verbs of state to jieba, as 好吃
    "adv": ("d", "zg", "c", "a", "p", "m", "b", "t", "r", "l", "i", "z", "v"),  # whatever joins and comments
    "phrase": ("",),
    None: ("",),
}
"""The first letters of jieba's tags that agree with a part of speech. They are the word's, whatever the sentence."""
_ASPECTS = frozenset("了过着")
_LONG = 3
"""From this length on a word that jieba does not know is hardly two others that happen to meet."""

_HAS_WORDS = re.compile(r"[^\W\d_]")
_VOWEL = re.compile(
    r"(?!uni(?![mn])|unan|us[aeu]|uti|ute|ubi|uku|ura|uri|eu|ewe|one(?![a-z])|once)[aeiou]|hour|honest|honou?r|heir"
)


class Perturber:
    """Changes texts as a section says. What comes out is a function of the section, the protected words, the key and
    the text alone.
    """

    def __init__(self, section: Perturbation, *, protected: Collection[str]) -> None:
        """`protected` words, the labels, are left as they are wherever they occur, and never put in.

        Raises `DataError` for a lexicon that cannot be read.
        """
        self._section = section
        self._protected = pattern_of(protected)
        self._lexicon = load_lexicon(section.lexicons) if section.synonyms else Lexicon({}, {})
        self._noisy = any(rate for _, rate in section.noise)

    def __call__(self, text: str, key: str) -> str:
        """`text` changed. It keeps its negations and protected words, and is never left without any word."""
        if not (self._section.synonyms or self._noisy):
            return text
        rng = random.Random(f"{self._section.seed}:{key}")
        tokens = tokens_of(text, protected=self._protected, tag=self._tag)
        expected = signature(text, self._protected)
        replaced = self._with_synonyms(tokens, rng)
        for changed in self._attempts(tokens, replaced, rng):
            # A slip can make a negation or a label of what was none, as `no` of `now`.
            if _HAS_WORDS.search(changed) and signature(changed, self._protected) == expected:
                return changed
        return text

    def _attempts(self, tokens: list[Token], replaced: list[Token], rng: random.Random) -> Iterator[str]:
        for some in [replaced] * _NOISE_ATTEMPTS + [tokens] * _NOISE_ATTEMPTS if self._noisy else []:
            text = _joined(some)
            mask = b"".join(token.mask for token in some)
            yield noised(text, mask, rng, self._section.noise, wide=language_of(text) == "zh")
        yield _joined(replaced)

    @cached_property
    def _tag(self) -> Callable[[str], list[tuple[str, str]]]:
        import rjieba  # wanted only for Chinese

        jieba = rjieba.Jieba()
        for word, group in self._lexicon.zh.items():
            if len(word) >= _LONG and not jieba.has_word(word):
                jieba.add_word(word, None, _TAGS[group.part])
        tag: Callable[[str], list[tuple[str, str]]] = jieba.tag
        return tag

    def _with_synonyms(self, tokens: list[Token], rng: random.Random) -> list[Token]:
        result = list(tokens)
        for at, token in enumerate(tokens):
            if token.fixed or not token.tag:
                continue
            group = self._group(tokens, at)
            if group is None or rng.random() >= self._section.synonyms:
                continue
            own = token.text.lower()
            others = [word for word in group.words if word != own and not self._is_protected(word)]
            if not others:
                continue
            word = rng.choice(others)
            if token.tag == LATIN_WORD:
                _put_in(result, at, word)
            else:
                result[at] = token._replace(text=word, mask=mask_of(word))
        return result

    def _group(self, tokens: list[Token], at: int) -> Group | None:
        """The synonyms of the token at `at`, where it is used as what they are."""
        token = tokens[at]
        if token.tag == LATIN_WORD:
            return self._lexicon.en.get(token.text.lower())
        group = self._lexicon.zh.get(token.text)
        if group is None or not token.tag.startswith(_AGREEING[group.part]):
            return None
        if group.part == "adv":  # 好得很 and 比较了 are no adverbs before a word
            before, after = (tokens[i].text if 0 <= i < len(tokens) else "" for i in (at - 1, at + 1))
            if before[-1:] == "得" or after[:1] in _ASPECTS:
                return None
        return group

    def _is_protected(self, word: str) -> bool:
        return self._protected is not None and self._protected.search(word) is not None


def augmented(
    rows: Sequence[Row], section: Augment, *, protected: Collection[str], forbidden: Container[str | None]
) -> Iterator[tuple[int, str]]:
    """Number of the row and changed text, for every copy of every row in turn.

    Never yields a text of `rows`, one of `forbidden`, which holds the held-out texts, or one text twice. A copy that
    is one is drawn again up to `ATTEMPTS` times and then left out, so that `copies * len(rows)` less the number of
    pairs yielded were left out.

    Raises `DataError`, before the first pair, for rows whose text is not known apart from the conversation, and for a
    lexicon that cannot be read.
    """
    return _copies(_with_text(rows, "data.augment"), section, Perturber(section, protected=protected), forbidden)


def perturbed(rows: Sequence[Row], section: Perturbation, *, protected: Collection[str]) -> list[str]:
    """The text of every row, changed; where nothing in it may be, as it is. Raises `DataError` like `augmented`."""
    perturber = Perturber(section, protected=protected)
    return [perturber(text, row.key) for row, text in _with_text(rows, "evaluation.perturbation")]


def _with_text(rows: Sequence[Row], setting: str) -> list[tuple[Row, str]]:
    pairs = [(row, row.text) for row in rows if row.text is not None]
    if len(pairs) < len(rows):
        bare = next(row for row in rows if row.text is None)
        raise DataError(
            expected="rows with a text of their own to change",
            found=f"no text apart from the conversation at {bare.where}",
            fix=f"store text and answer in columns (data.columns), or set {setting}=null",
        )
    return pairs


def _copies(
    pairs: Sequence[tuple[Row, str]], section: Augment, perturber: Perturber, forbidden: Container[str | None]
) -> Iterator[tuple[int, str]]:
    taken = {text for _, text in pairs}
    for copy in range(section.copies):
        for number, (row, text) in enumerate(pairs):
            for attempt in range(1 + ATTEMPTS):
                changed = perturber(text, f"{copy}:{row.key}" + f":{attempt}" * bool(attempt))
                if changed not in taken and changed not in forbidden:
                    taken.add(changed)
                    yield number, changed
                    break


def _joined(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens)


def _put_in(tokens: list[Token], at: int, word: str) -> None:
    """Put `word` in the place of a Latin word, with its capital, and with the article before it made to fit."""
    token = tokens[at]
    vowel, wanted = (_VOWEL.match(some) is not None for some in (token.text.lower(), word))
    article = _article(tokens, at)
    if article is not None and vowel != wanted:
        if tokens[article].fixed:
            return
        form = tokens[article].text[0] + ("n" if wanted else "")
        tokens[article] = tokens[article]._replace(text=form, mask=bytes(len(form)))
    if token.text[0].isupper():
        tokens[at] = token._replace(text=word[0].upper() + word[1:], mask=bytes(len(word)))
    else:
        tokens[at] = token._replace(text=word, mask=mask_of(word))


def _article(tokens: list[Token], at: int) -> int | None:
    """Where the article directly before the word at `at` stands, if there is one."""
    before = at - 1
    while before >= 0 and tokens[before].text.isspace():
        before -= 1
    return before if before >= 0 and before < at - 1 and tokens[before].text.lower() in ("a", "an") else None
