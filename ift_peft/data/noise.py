"""Slips of the hand: characters doubled, dropped, exchanged or mistaken, and careless white space."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from ift_peft.data.protection import FREE, FROZEN, SPACING
from ift_peft.sections import Noise

_CONFUSION = Path(__file__).resolve().parent / "lexicon" / "confusion.txt"
_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_NARROW, _WIDE = " ,.!?;:()~", "\u3000，。！？；：（）～"
_WIDTHS = dict(zip(_NARROW + _WIDE, _WIDE + _NARROW, strict=True))


@cache
def confusions() -> dict[str, str]:
    """What each character is mistaken for: Han of like sound or shape, Latin letters beside it on the keyboard."""
    groups = [line for line in _CONFUSION.read_text("utf-8").splitlines() if not line.startswith("#")]
    table = {one: group.replace(one, "") for group in groups for one in group}
    for number, keys in enumerate(_KEYBOARD):
        for at, key in enumerate(keys):
            near = keys[max(0, at - 1) : at] + keys[at + 1 : at + 2]
            if number:  # each row stands half a key to the right of the one above it
                near += _KEYBOARD[number - 1][at : at + 2]
            if number + 1 < len(_KEYBOARD):
                near += _KEYBOARD[number + 1][max(0, at - 1) : at + 1]
            table[key] = near
    return table


def noised(text: str, mask: bytes, rng: random.Random, noise: Noise, *, wide: bool) -> str:
    """`text` with slips, each where `mask` lets it and as often as `noise` says.

    At most one slip befalls a character; rates that add up to more than 1 are taken relative to their sum. `wide`:
    white space and punctuation may change its width, as writers of Chinese change it.
    """
    table, out, at = confusions(), [], 0
    inserted = noise.insert
    deleted = inserted + noise.delete
    swapped = deleted + noise.swap
    confused = swapped + noise.confuse
    scale = max(1.0, confused)
    while at < len(text):
        here, may = text[at], mask[at]
        at += 1
        if may == FROZEN:
            out.append(here)
        elif may == SPACING:
            out.append(_respaced(text, mask, at - 1, rng, wide) if noise.spacing > rng.random() else here)
        elif not confused or (drawn := rng.random() * scale) >= confused:
            out.append(here)
        elif drawn < inserted:
            out.append(here + (rng.choice(here + table[here]) if here.isascii() else here))
        elif drawn < deleted:
            out.append("" if may == FREE else here)
        elif drawn < swapped:
            if _exchangeable(text, mask, at):
                out.append(text[at])
                at += 1
            out.append(here)
        else:
            out.append(rng.choice(table.get(here, here)))
    return "".join(out)


def _exchangeable(text: str, mask: bytes, at: int) -> bool:
    """Whether the character at `at` may change places with the one before it."""
    return (
        at < len(text)
        and mask[at] not in (FROZEN, SPACING)
        and text[at] != text[at - 1]
        and text[at].isascii() == text[at - 1].isascii()
    )


def _respaced(text: str, mask: bytes, at: int, rng: random.Random, wide: bool) -> str:
    here = text[at]
    choices = [here + here]
    # Without what parts them, a number, a name or a negation would run into its neighbour and be another.
    if FROZEN not in mask[max(0, at - 1) : at + 2]:
        choices.append("")
    if wide and here in _WIDTHS:
        choices.append(_WIDTHS[here])
    return rng.choice(choices)
