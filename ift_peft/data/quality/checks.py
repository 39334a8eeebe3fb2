"""All checks of training rows, each into at most two findings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

from ift_peft.data.quality import duplicates
from ift_peft.data.quality.finding import KINDS, Finding, Hit, action_of, finding, text_of
from ift_peft.data.quality.mislabelled import WEAK, judge
from ift_peft.data.quality.personal_data import personal_data
from ift_peft.data.quality.writing import bad_characters, language_of
from ift_peft.data.row import Row
from ift_peft.reporter import Reporter, Silent
from ift_peft.sections import Classes, Quality

OF_LABELS = ("mislabelled", "imbalance")


def find(
    train: Sequence[Row],
    test: Sequence[Row],
    section: Quality,
    *,
    labels: Classes,
    lengths: Sequence[int] | None,
    max_length: int | None,
    progress: Reporter | None = None,
) -> list[Finding]:
    """Everything that the checks which are not off find, in the order of the section's settings.

    `labels` are the recipe's classes, empty for free answers, or those of each source of a mix; `lengths` the token
    counts of the training rows before they were made to fit `max_length`. Only training rows are objected to. What has
    to do with classes is looked for in each source of a mix by itself.
    """
    whole = () if isinstance(labels, dict) else labels
    checks = _Checks(train, test, section, whole, lengths if max_length is not None else None, max_length or 0)
    active = [kind for kind in KINDS if action_of(kind, section) != "off"]
    progress = progress or Silent()
    progress.stage("checking rows", len(active))
    findings: list[Finding] = []
    for done, kind in enumerate(active):
        progress.advance(done, kind)
        if isinstance(labels, dict) and kind in OF_LABELS:
            findings += _in_each(kind, train, section, labels)
        else:
            findings += checks.by_kind[kind]()
    progress.advance(len(active))
    progress.finish()
    return findings


def _in_each(kind: str, train: Sequence[Row], section: Quality, labels: dict[str, tuple[str, ...]]) -> list[Finding]:
    """What a check finds in the rows of each source that has classes, with the source's name."""
    findings = []
    for source, (name, words) in enumerate(labels.items()):
        at = [number for number, row in enumerate(train) if row.source == source]
        checks = _Checks([train[number] for number in at], (), section, words, None, 0)
        for found in checks.by_kind[kind]() if words else ():
            rows = tuple(at[number] for number in found.rows)
            findings.append(replace(found, rows=rows, advice=f"in {name}: {found.advice}"))
    return findings


class _Checks:
    """The rows with what several checks need of them, computed once."""

    def __init__(
        self,
        train: Sequence[Row],
        test: Sequence[Row],
        section: Quality,
        labels: Sequence[str],
        lengths: Sequence[int] | None,
        max_length: int,
    ) -> None:
        self.train, self.test, self.section = train, test, section
        self.labels, self.lengths, self.max_length = labels, lengths, max_length
        self.by_kind: dict[str, Callable[[], list[Finding]]] = {kind: getattr(self, f"_{kind}") for kind in KINDS}

    @cached_property
    def questions(self) -> list[int]:
        return duplicates.first_with_same_question(self.train)

    @cached_property
    def copies(self) -> dict[int, int]:
        return duplicates.exact(self.train, self.questions)

    @cached_property
    def near(self) -> dict[int, int]:
        return duplicates.near(self.train, self.copies, threshold=self.section.near_threshold)

    def _found(self, kind: str, hits: Sequence[Hit], advice: str = "") -> list[Finding]:
        return [finding(kind, hits, self.train, self.section, advice=advice)] if hits else []

    def _exact_duplicates(self) -> list[Finding]:
        hits = [Hit(row, f"the same as {self.train[first].where}") for row, first in self.copies.items()]
        return self._found("exact_duplicates", hits)

    def _near_duplicates(self) -> list[Finding]:
        hits = [Hit(row, f"nearly the same as {self.train[first].where}") for row, first in sorted(self.near.items())]
        return self._found("near_duplicates", hits)

    def _leakage(self) -> list[Finding]:
        found = duplicates.leaks(self.train, self.test, threshold=self.section.near_threshold)
        hits = [Hit(row, f"held out as well: {self.test[held_out].where}") for row, held_out in found.items()]
        rows = len(set(found.values()))
        return self._found("leakage", hits, f"{rows} of {len(self.test)} held-out rows are concerned" if hits else "")

    def _contradictions(self) -> list[Finding]:
        groups: dict[int, list[int]] = defaultdict(list)
        for number, question in enumerate(self.questions):
            if self.train[number].label is not None:
                groups[question].append(number)
        hits = []
        for numbers in groups.values():
            for number in numbers:
                other = next((one for one in numbers if self.train[one].label != self.train[number].label), None)
                if other is not None:
                    row, contrary = self.train[number], self.train[other]
                    hits.append(Hit(number, f"{row.label!r} here, {contrary.label!r} at {contrary.where}"))
        return self._found("contradictions", hits)

    def _mislabelled(self) -> list[Finding]:
        numbers = [number for number, row in enumerate(self.train) if row.label is not None]
        # Near duplicates are not looked for on this account alone: exact ones do most of the harm.
        nears = self.near if action_of("near_duplicates", self.section) != "off" else {}
        groups = [nears.get(number, self.questions[number]) for number in numbers]
        texts = [text_of(self.train[number]) for number in numbers]
        labels = [str(self.train[number].label) for number in numbers]
        verdict = judge(texts, labels, groups, seed=self.section.seed)
        if verdict is None:
            return []
        by = f"by a classifier that agrees with {verdict.agreement:.0%} of labels"
        if not verdict.judged:
            told = finding("mislabelled", (), self.train, self.section)
            return [replace(told, severity="note", advice=f"not judged: {by[3:]} can tell nothing about the others")]
        hits = [
            Hit(numbers[at], f"{labels[at]!r} here, {expected!r} by the classifier")
            for at, expected in zip(verdict.rows, verdict.expected, strict=True)
        ]
        if verdict.agreement >= WEAK:
            return self._found("mislabelled", hits, by)
        found = self._found("mislabelled", hits, f"{by}, so many are its own errors")
        return [replace(one, severity="note") if one.severity == "warning" else one for one in found]

    def _overlong(self) -> list[Finding]:
        longest = sorted(enumerate(self.lengths or ()), key=lambda pair: -pair[1])
        hits = [
            Hit(row, f"{tokens} tokens, over {self.max_length}") for row, tokens in longest if tokens > self.max_length
        ]
        return self._found("overlong", hits, f"the longest has {longest[0][1]} tokens" if hits else "")

    def _imbalance(self) -> list[Finding]:
        counts = Counter(dict.fromkeys(self.labels, 0))
        counts.update(row.label for row in self.train if row.label is not None)
        if not counts:
            return []
        findings = []
        missing = [label for label, count in counts.items() if not count]
        if missing:
            told = finding("imbalance", (), self.train, self.section, advice=f"no row of {', '.join(missing)}")
            findings.append(replace(told, severity="error", count=len(missing)))
        common, most = counts.most_common(1)[0]
        rare = {label for label, count in counts.items() if count and most / count >= self.section.imbalance_ratio}
        hits = [
            Hit(number, f"{counts[row.label]} rows of {row.label!r}, {most} of {common!r}")
            for number, row in enumerate(self.train)
            if row.label in rare
        ]
        return findings + self._found("imbalance", hits)

    def _characters(self) -> list[Finding]:
        hits = []
        for number, row in enumerate(self.train):
            for message in row.messages:
                bad = bad_characters(message["content"])
                if bad is not None:
                    hits.append(Hit(number, bad[0], message["content"], bad[1]))
                    break
        return self._found("characters", hits)

    def _language(self) -> list[Finding]:
        allowed: tuple[str, ...] = self.section.languages
        if not allowed:
            return []
        languages = [language_of(text_of(row)) for row in self.train]
        hits = [
            Hit(number, f"{language}, not {' or '.join(allowed)}")
            for number, language in enumerate(languages)
            if language is not None and language not in allowed
        ]
        return self._found("language", hits)

    def _personal_data(self) -> list[Finding]:
        hits = []
        for number, row in enumerate(self.train):
            for text in personal_texts(row):
                spans = personal_data(text)
                if spans:
                    words = ", ".join(dict.fromkeys(f"[{span.word}]" for span in spans))
                    hits.append(Hit(number, words, text, spans[0].start))
                    break
        return self._found("personal_data", hits)


def personal_texts(row: Row) -> list[str]:
    """The pieces of a row that are its own: not the instruction that all share, and not a label."""
    asked = row.prompt if row.text is None else row.earlier
    texts = [message["content"] for message in asked] + ([] if row.text is None else [row.text])
    return texts if row.label is not None else [*texts, row.answer]
