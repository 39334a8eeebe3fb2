"""A text cut into tokens, each with what may be changed about it: what a label hangs on is left as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

FROZEN, KEPT, FREE, SPACING = range(4)
"""What noise may do with a character: nothing, all but lose it, anything, or treat it as white space."""

LATIN_WORD = "la"
"""Tag of words in Latin letters; Chinese words bear the tags of jieba."""

HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_HAN_NEGATIONS = "不没沒无無别別未非毫勿莫甭弗否"
_LATIN_NEGATIONS = (
    "not|no|never|nor|neither|none|nothing|nobody|nowhere|cannot|without|hardly|barely|scarcely|"
    "(?:ai|are|ca|could|did|do|does|had|has|have|is|must|need|should|was|were|wo|would)nt"
)
NEGATION = re.compile(rf"[{_HAN_NEGATIONS}]|(?<![a-z])(?:{_LATIN_NEGATIONS})(?![a-z])|n['’]t(?![a-z])")
"""A negation in lower-case text."""

_NOT_NEGATING = re.compile(
    "[特区差个分级性类告辨识鉴]别|别[人的家处墅致样]|[真挺很还也]?不错|只?不过|不[仅但光单只管论少断愧禁久时]|不仅仅|"
    "不得不|差不多|了不起|无论是?|无[比线疑]|未来|毫[米升安]|莫[非名]|莫名其妙|否则|是否|除非|非[常凡得]"
)
"""Words written with a negation that negate nothing after them. They are kept as they are, like the others."""

_ADVERBS = ("d", "zg", "p", "r", "u")
_PASSED = re.compile("[是有太很算]|觉得|感觉|[那这怎]么|an?|the|any|all|be|been|very|too|so|that|as|really|quite|such")
"""Words that a negation reaches through, with the tags above: in 不是很好 it is 好 that is negated."""

_NAMES = ("nr", "ns", "nt", "nz")
_PARTICLES = ("u", "y", "e", "r", "p", "c")
_CLAUSE_ENDS = frozenset(".,;:!?()，。；：！？（）、…~～\n")
_SPACINGS = frozenset(" \u3000,.;:!?()，。；：！？（）、…~～")
_JAPANESE = re.compile("[\u3041-\u306d\u306f-\u3096\u30a1-\u30fa]")  # without の, which Chinese writers use as well
_DIGITS = re.compile(r"\d+")
_TITLES = frozenset({"mr", "mrs", "ms", "dr", "prof", "st"})

_TOKEN = re.compile(
    rf"""
      (?P<kept> (?:https?://|www\.)[^\s\u3000-\u303f{HAN}\uff00-\uffef]+
        | [A-Za-z0-9._%+-]{{1,64}}@[A-Za-z0-9-]{{1,63}}(?:\.[A-Za-z0-9-]{{1,63}})*
        | (?:[A-Za-z0-9-]{{1,63}}\.){{1,5}}(?:com|cn|net|org|io|edu|gov)(?![A-Za-z])(?:/[!-~]*)?
        | @\w+ | &\#?\w{{1,10}}; | \$\{{\w+\}} | %\(\w+\)[sdf] | %[sdf](?!\w)
        | \{{{{[^{{}}\n]{{0,60}}\}}}} | \{{[^{{}}\n]{{0,60}}\}} | <[^<>\n]{{1,60}}> | \[[A-Z_]{{2,20}}\]
        | [:;=]['^-]?[()DPp/\\|]+ | \([:;=]['^-]? )
    | (?P<han> [{HAN}]+ )
    | (?P<number> [A-Za-z]*[0-9](?:[0-9A-Za-z]|[.,:/%-](?=[0-9]))* )
    | (?P<word> [A-Za-z\u00c0-\u024f]+(?:['’-][A-Za-z\u00c0-\u024f]+)* )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    """A piece of a text: whether another word may stand in its place, and what noise may do with each character."""

    text: str
    tag: str
    fixed: bool
    mask: bytes


def pattern_of(words: Collection[str]) -> re.Pattern[str] | None:
    """Where any of `words` begins, also inside longer words and each other; capitals do not matter."""
    longest_first = sorted({word for word in words if word}, key=lambda word: (-len(word), word))
    return re.compile(f"(?=({'|'.join(map(re.escape, longest_first))}))", re.IGNORECASE) if longest_first else None


def tokens_of(
    text: str, *, protected: re.Pattern[str] | None, tag: Callable[[str], list[tuple[str, str]]]
) -> list[Token]:
    """The tokens of `text`, which joined are the text again. `tag` segments a run of Han into words with tags.

    Left as they are: what `protected` finds, negations and what they reach, names, numbers, placeholders, addresses,
    and everything in other scripts than Han and Latin.
    """
    pieces = []
    japanese = _JAPANESE.search(text) is not None
    for found in _TOKEN.finditer(text):
        kind, piece = found.lastgroup, found.group()
        if kind == "han" and not japanese:
            pieces += [_han_token(word, given) for word, given in tag(piece)]
        elif kind == "word":
            pieces.append(_latin_token(piece, text, found.start()))
        else:
            pieces.append(Token(piece, "", True, bytes([SPACING if piece in _SPACINGS else FROZEN] * len(piece))))
    pieces = _without_reach(pieces)
    return pieces if protected is None else _without_protected(pieces, text, protected)


def mask_of(word: str) -> bytes:
    """What noise may do with the characters of a word that is put in."""
    if not word[:1].isascii():
        return bytes([FREE if len(word) > 1 else KEPT] * len(word))
    free = FREE if len(word) > 2 else KEPT
    return bytes(free if "a" <= character <= "z" else FROZEN for character in word)


def signature(text: str, protected: re.Pattern[str] | None) -> tuple[list[str], list[str], list[str]]:
    """What no change may add to or take from a text: its negations, numbers and protected words, in order."""
    lower = text.lower()
    return NEGATION.findall(lower), _DIGITS.findall(text), [] if protected is None else protected.findall(lower)


def _han_token(word: str, tag: str) -> Token:
    if NEGATION.search(word) or tag in _NAMES:
        return Token(word, tag, True, bytes(len(word)))
    if tag == "m":  # numbers, and some words written with one, as 十分, which the lexicon knows
        return Token(word, tag, False, bytes(len(word)))
    # A word of one character is lost with it, and with it may go what the text says.
    free = FREE if len(word) > 1 or tag.startswith(_PARTICLES) else KEPT
    return Token(word, tag, False, bytes([free]) * len(word))


def _latin_token(word: str, text: str, start: int) -> Token:
    if word.isascii() and word.islower():
        fixed = NEGATION.search(word) is not None
        return Token(word, LATIN_WORD, fixed, bytes(len(word)) if fixed else mask_of(word))
    ordinary = word.isascii() and not any(letter.isupper() for letter in word[1:]) and _begins_sentence(text, start)
    return Token(word, LATIN_WORD, not ordinary or NEGATION.search(word.lower()) is not None, bytes(len(word)))


def _begins_sentence(text: str, start: int) -> bool:
    """Whether a capital at `start` may stand there for the sentence and not for a name."""
    before = text[max(0, start - 40) : start].rstrip(" \t\"'“”‘’()（）[]「」")
    if not before:
        return start < 40
    if before[-1] == "." and before[:-1].split()[-1:] and before[:-1].split()[-1].lower() in _TITLES:
        return False
    return before[-1] in ".!?。！？…:：;；\n"


def _without_reach(tokens: list[Token]) -> list[Token]:
    """`tokens` with those fixed that a negation before them reaches: two Latin words, the next Chinese one."""
    left, result = 0, []
    for token in tokens:
        word = token.text
        if not token.tag:
            left = 0 if word in _CLAUSE_ENDS else left
        elif NEGATION.search(word.lower()):
            if not _NOT_NEGATING.fullmatch(word):
                left = 2 if token.tag == LATIN_WORD else 1
        elif left:
            token = Token(word, token.tag, True, bytes(len(word)))
            if not (token.tag.startswith(_ADVERBS) or _PASSED.fullmatch(word)):
                left -= 1
        result.append(token)
    return result


def _without_protected(tokens: list[Token], text: str, protected: re.Pattern[str]) -> list[Token]:
    held = bytearray(len(text))
    for found in protected.finditer(text):
        held[found.start() : found.end(1)] = b"\x01" * (found.end(1) - found.start())
    if not any(held):
        return tokens
    result, start = [], 0
    for token in tokens:
        end = start + len(token.text)
        if any(held[start:end]):
            mask = bytes(FROZEN if holds else may for may, holds in zip(token.mask, held[start:end], strict=True))
            token = Token(token.text, token.tag, True, mask)
        result.append(token)
        start = end
    return result
