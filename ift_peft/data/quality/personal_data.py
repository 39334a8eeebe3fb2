"""Personal data in texts: e-mail addresses, phone numbers, Chinese resident IDs and bank cards.

Numbers count only where they prove themselves: an ID and a card by checksum and issuer, a phone number by the numbering
plan of its country and by being written like one. Order numbers, prices and dates are left alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import stdnum.cn.ric
import stdnum.luhn
from phonenumbers import Leniency, PhoneNumberMatcher

Word = Literal["EMAIL", "PHONE", "ID", "CARD"]

_DIGITS = {ord("０") + digit: str(digit) for digit in range(10)} | {ord("＋"): "+", ord("－"): "-", ord("＠"): "@"}
# At most 64 characters before the sign, as the standard has it: a search without a bound is quadratic in long lines.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])"
)
_ID = re.compile(r"(?<!\d)\d{6}[ -]?\d{8}[ -]?\d{3}[\dXx](?!\d)")
_CARD = re.compile(r"(?<!\d)(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{4}([ -])\d{6}\2\d{4,5})(?!\d)")
# Issuers by prefix, each with the lengths of its numbers.
_ISSUERS = (
    (re.compile("4"), (13, 16, 19)),  # Visa, and Chinese cards with its prefix
    (re.compile("5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),  # Mastercard
    (re.compile("62"), (16, 17, 18, 19)),  # UnionPay
    (re.compile("95(?:58|59)"), (19,)),  # older Chinese debit cards
    (re.compile("3[47]"), (15,)),  # American Express
    (re.compile("35(?:2[89]|[3-8])"), (16, 17, 18, 19)),  # JCB
    (re.compile("6011|64[4-9]|65"), (16, 17, 18, 19)),  # Discover
    (re.compile("30[0-5]|36|38"), (14,)),  # Diners Club
)
_ADDRESS = re.compile(r"https?://[!-~]+")  # of a page: numbers in it are of goods
_DATE = re.compile(r"(?<!\d)(?:19|20)\d\d[-/.年]\d{1,2}[-/.月]\d{1,2}(?:\s+\d{1,2}:\d\d)?(?!\d)")
_LONG = re.compile(r"(?<![\d+])\d{12,}|(?<![\d+])\d{4}(?:[ -]\d{4}){3,}")  # longer than phone numbers without a +
_MAYBE_PHONE = re.compile(r"\+?\d(?:[\s().\-/–—]{0,3}\d){6,}")
MIN_DIGITS = 9  # with the area code; what is shorter is more often a range or a number of goods
_MOBILE = re.compile(r"1[3-9]\d{9}")
_PHONE_WORD = re.compile(
    r"电话|手机|致电|拨打|联系|热线|客服|微信|tel|phone|call|mobile|cell|whatsapp|text me", re.IGNORECASE
)
_BEFORE = 16  # characters before a number in which such a word counts
# The grouping is checked where numbers are short or written in many ways, and so easily hit by chance.
_REGIONS = (("CN", Leniency.VALID), ("US", Leniency.STRICT_GROUPING), ("GB", Leniency.STRICT_GROUPING))


@dataclass(frozen=True, order=True)
class Span:
    """A piece of personal data: `text[start:end]`, of one kind."""

    start: int
    end: int
    word: Word


def redact(text: str) -> tuple[str, dict[str, int]]:
    """`text` with a word for each piece of personal data in it, and how many of each kind there were."""
    spans = personal_data(text)
    return without(spans, text), dict(Counter(span.word for span in spans))


def without(spans: Sequence[Span], text: str, *, start: int = 0, end: int | None = None) -> str:
    """`text[start:end]` with `[EMAIL]` and the like in the place of `spans`, which are in order."""
    end = len(text) if end is None else min(end, len(text))
    pieces, position = [], start
    for span in spans:
        if span.end > start and span.start < end:
            pieces += [text[position : max(position, span.start)], f"[{span.word}]"]
            position = span.end
    return "".join([*pieces, text[position:end]])


def personal_data(text: str) -> list[Span]:
    """All pieces of personal data, in order, none within another."""
    plain = text.translate(_DIGITS)  # character by character, so that positions stay
    spans: list[Span] = []
    for word, found in (("EMAIL", _emails), ("ID", _ids), ("CARD", _cards), ("PHONE", _phones)):
        for start, end in found(plain):
            spans.append(Span(start, end, word))  # type: ignore[arg-type]
            plain = plain[:start] + "。" * (end - start) + plain[end:]
    return sorted(spans)


def _emails(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in _EMAIL.finditer(text)] if "@" in text else []


def _ids(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in _ID.finditer(text) if stdnum.cn.ric.is_valid(match.group())]


def _cards(text: str) -> list[tuple[int, int]]:
    spans = []
    for match in _CARD.finditer(text):
        # A grouped number of 19 digits may also be one of 16 with another number after it.
        grouped = not match.group().isdigit() and len(match.group()) > 19
        for end in (match.end(), match.start() + 19) if grouped else (match.end(),):
            if _is_card(re.sub("[ -]", "", text[match.start() : end])):
                spans.append((match.start(), end))
                break
    return spans


def _is_card(digits: str) -> bool:
    issued = any(len(digits) in lengths and prefix.match(digits) for prefix, lengths in _ISSUERS)
    return issued and stdnum.luhn.is_valid(digits)


def _phones(text: str) -> list[tuple[int, int]]:
    if _MAYBE_PHONE.search(text) is None:
        return []
    for pattern in (_ADDRESS, _DATE, _LONG):
        text = pattern.sub(lambda match: "。" * len(match.group()), text)
    spans: list[tuple[int, int]] = []
    for start, end in _phone_candidates(text):
        if not any(start < other_end and other_start < end for other_start, other_end in spans):
            spans.append((start, end))
    return spans


def _phone_candidates(text: str) -> Iterator[tuple[int, int]]:
    for region, leniency in _REGIONS:
        for match in PhoneNumberMatcher(text, region, leniency=leniency):
            start, end = match.start, match.end
            if text[start] in "(（" and not re.search("[)）]", text[start:end]):
                start += 1  # the bracket is around the number, not part of it
            inside = text[start - 1 : start].isdigit() or text[end : end + 1].isdigit()
            if not inside and (
                _is_written_as_phone(text[start:end]) or _PHONE_WORD.search(text, max(0, start - _BEFORE), start)
            ):
                yield start, end


def _is_written_as_phone(raw: str) -> bool:
    """Digits alone, or between spaces, could be anything but a Chinese mobile number."""
    digits = re.sub(r"\D", "", raw)
    if _MOBILE.fullmatch(digits.removeprefix("86")):
        return True
    return len(digits) >= MIN_DIGITS and not raw.isdigit() and (raw[0] == "0" or bool(re.search("[+)）.-]", raw)))
