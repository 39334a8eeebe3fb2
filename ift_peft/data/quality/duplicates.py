"""Rows that say the same as another: exactly, nearly, or as a held-out row does.

Near means a Jaccard similarity of character trigrams of at least `near_threshold`. Candidates come from MinHash bands,
each is then compared exactly, so that nothing below the threshold is found; of what is above, at least 99 in 100 are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ift_peft.data.quality.finding import normal, text_of
from ift_peft.data.row import Row

if TYPE_CHECKING:
    from datasketch import MinHash  # with the half of scipy; most who import this file look for no duplicates

PERMUTATIONS = 128
RECALL = 0.99  # of the pairs that are just at the threshold
Trigrams = NDArray[np.uint64]


def first_with_same_question(rows: Sequence[Row]) -> list[int]:
    """For each row, the number of the first that asks the same.

    That is an equal prompt, or an equal text of the same source, whose prompts may differ by the phrasing drawn.
    """
    first: dict[object, int] = {}
    numbers = []
    for number, row in enumerate(rows):
        keys: list[object] = [tuple((message["role"], normal(message["content"])) for message in row.prompt)]
        if row.text is not None:
            keys.append((row.source, normal(row.text), tuple(normal(turn["content"]) for turn in row.earlier)))
        found = min((first[key] for key in keys if key in first), default=number)
        for key in keys:
            first.setdefault(key, found)
        numbers.append(found)
    return numbers


def exact(rows: Sequence[Row], questions: Sequence[int]) -> dict[int, int]:
    """Rows with the same question and answer as an earlier one, and the first such."""
    first: dict[tuple[int, str], int] = {}
    found = {}
    for number, (row, question) in enumerate(zip(rows, questions, strict=True)):
        leader = first.setdefault((question, normal(row.answer)), number)
        if leader != number:
            found[number] = leader
    return found


def near(rows: Sequence[Row], copies: dict[int, int], *, threshold: float) -> dict[int, int]:
    """Rows nearly equal to an earlier one, and that one, which is near no earlier one itself.

    `copies` are the exact duplicates: copies of a near duplicate are near as well. Answers must be alike, too: labels
    equal, free text nearly equal. A like question with another answer teaches something else.
    """
    numbers = [number for number in range(len(rows)) if number not in copies]
    index = _Index(threshold)
    answers: dict[int, Trigrams] = {}

    def alike(number: int, other: int) -> bool:
        if rows[number].label is not None or rows[other].label is not None:
            return rows[number].label == rows[other].label
        for key in (number, other):
            answers.setdefault(key, trigrams(rows[key].answer))
        return jaccard(answers[number], answers[other]) >= threshold

    found = {}
    grams = [trigrams(text) for text in bare_texts([rows[number] for number in numbers])]
    for number, own, signature in zip(numbers, grams, signatures(grams), strict=True):
        leader = index.first_near(own, signature, lambda other, number=number: alike(number, other))  # type: ignore[misc]
        if leader is None:
            index.add(number, own, signature)
        else:
            found[number] = leader
    found |= {copy: found[first] for copy, first in copies.items() if first in found}
    return found


def leaks(train: Sequence[Row], test: Sequence[Row], *, threshold: float) -> dict[int, int]:
    """Training rows whose text is equal or nearly equal to that of a held-out row, whatever the answer, and that row.

    The text is what counts where a row has one: another phrasing of the instruction around it is no other question.
    """
    texts = bare_texts([*train, *test])
    index = _Index(threshold)
    held_out = dict.fromkeys(map(normal, texts[len(train) :]))  # each once
    first = {text: number for number, text in reversed(list(enumerate(map(normal, texts[len(train) :]))))}
    grams = [trigrams(text) for text in held_out]
    for text, own, signature in zip(held_out, grams, signatures(grams), strict=True):
        index.add(first[text], own, signature)
    found = {}
    grams = [trigrams(text) for text in texts[: len(train)]]
    for number, (own, signature) in enumerate(zip(grams, signatures(grams), strict=True)):
        leader = index.first_near(own, signature)
        if leader is not None:
            found[number] = leader
    return found


def bare_texts(rows: Sequence[Row]) -> list[str]:
    """The text of each row, without a beginning that all of them share: an instruction would make all alike."""
    texts = [text_of(row) for row in rows]
    shared = 0 if all(row.text is not None for row in rows) else len(os.path.commonprefix(texts))  # noqa: RUF071
    return [text[shared:] for text in texts] if len(set(texts)) > 1 else texts


def trigrams(text: str) -> Trigrams:
    """The set of character trigrams of a text, sorted, three code points packed into each number."""
    padded = normal(text).ljust(3)
    points = np.frombuffer(padded.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    packed = points[:-2] | points[1:-1] << np.uint64(21) | points[2:] << np.uint64(42)
    return np.unique(packed)


def jaccard(one: Trigrams, other: Trigrams) -> float:
    """Size of the intersection over size of the union."""
    common = int(np.intersect1d(one, other, assume_unique=True).size)
    return common / (one.size + other.size - common)


def signatures(sets: Iterable[Trigrams]) -> Iterator[MinHash]:
    """A MinHash of each set. Trigrams are hashed here by a multiplication, far faster than by the default SHA-1."""
    from datasketch import MinHash

    hashed = ((own * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)).tolist() for own in sets)
    yield from MinHash.generator(hashed, num_perm=PERMUTATIONS, seed=0, hashfunc=int)


class _Index:
    """Sets to be found again by one that is near."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self._threshold = threshold
        self._bands = MinHashLSH(num_perm=PERMUTATIONS, params=_bands(threshold))
        self._sets: dict[int, Trigrams] = {}

    def add(self, number: int, own: Trigrams, signature: MinHash) -> None:
        self._bands.insert(number, signature)
        self._sets[number] = own

    def first_near(
        self, own: Trigrams, signature: MinHash, accept: Callable[[int], bool] = lambda other: True
    ) -> int | None:
        """The lowest number of a set at or over the threshold that is also accepted."""
        for number in sorted(self._bands.query(signature)):
            if jaccard(own, self._sets[number]) >= self._threshold and accept(number):
                return int(number)
        return None


def _bands(threshold: float) -> tuple[int, int]:
    """Bands and hashes in each: the longest bands, so the fewest candidates, that still give `RECALL`."""
    for size in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // size
        if 1 - (1 - threshold**size) ** bands >= RECALL:
            return bands, size
    return PERMUTATIONS, 1
