"""Generated answers against their references: exact match, F1, BLEU, chrF and ROUGE, for Chinese and English.

Every score is between 0 and 1; sacrebleu and many papers give BLEU and chrF times 100. Exact match, F1 and ROUGE are
means over rows. BLEU and chrF are of the corpus: their n-gram counts are summed over rows, and so they are resampled.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np

from ift_peft.data.row import language_of
from ift_peft.evaluate.gates import ROUGE
from ift_peft.evaluate.intervals import Floats, wilson
from ift_peft.evaluate.metrics import Metrics, Resampling
from ift_peft.evaluate.rowwise import Score, compared, mean, with_ones

TEXT_METRICS = ("exact_match", "f1", "bleu", "chrf", "rouge")

# What the official script of CMRC 2018 takes out of answers; ASCII commas and full stops are not among them.
CMRC_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
CMRC_HAN = re.compile("[\u4e00-\u9fa5]")
ARTICLES = re.compile(r"\b(a|an|the)\b")
ROUGE_TOKEN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[a-z0-9]+")


@dataclass(frozen=True)
class TextScores:
    """Scores of generated answers by name, and how sacrebleu names its settings."""

    base: Metrics = field(default_factory=dict)
    adapter: Metrics = field(default_factory=dict)
    change: Metrics = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)


def text_scores(
    references: Sequence[str],
    base: Sequence[str],
    adapter: Sequence[str],
    *,
    names: Sequence[str],
    resampling: Resampling,
) -> TextScores:
    """The metrics of these `names` for the answers of base and adapter to the same rows; `rouge` is three of them."""
    scores = TextScores()
    for name in (name for name in TEXT_METRICS if name in names):
        if name in CORPUS_METRICS:
            metric = CORPUS_METRICS[name](references)
            score: Score = partial(_corpus_score, metric)
            before, after = ({name: _corpus_rows(metric, references, texts)} for texts in (base, adapter))
            scores.signatures[name] = str(metric.get_signature())
        else:
            score = mean
            before, after = (ROW_METRICS[name](references, texts) for texts in (base, adapter))
        for part in before:
            found = compared(before[part], after[part], score=score, resampling=resampling)
            scores.base[part], scores.adapter[part], scores.change[part] = found.base, found.adapter, found.change
    if "exact_match" in scores.base:  # a proportion, and often one near 0, of which a bootstrap knows nothing
        for who in (scores.base, scores.adapter):
            hits = round(who["exact_match"].value * len(references))
            who["exact_match"] = wilson(hits, len(references), confidence=resampling.confidence)
    return scores


def exact_match(reference: str, answer: str) -> bool:
    """Whether an answer is the reference, as CMRC 2018 sees it for a Chinese reference, SQuAD for any other."""
    if language_of(reference) == "zh":
        return _cmrc_plain(reference) == _cmrc_plain(answer)
    return _squad_words(reference) == _squad_words(answer)


def f1(reference: str, answer: str) -> float:
    """How much of reference and answer is common to both.

    Chinese (CMRC 2018, arXiv:1810.07366, official script): the longest run of tokens in both, where a token is a
    character or an English word. English (SQuAD 2.0, arXiv:1806.03822, official script): words, in any order.
    """
    if language_of(reference) == "zh":
        wanted, found = _cmrc_tokens(reference), _cmrc_tokens(answer)
        common = longest_common_run(wanted, found)
    else:
        wanted, found = _squad_words(reference), _squad_words(answer)
        if not wanted or not found:
            return float(wanted == found)
        common = sum((Counter(wanted) & Counter(found)).values())
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def longest_common_run(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest stretch of tokens that stands in both without a gap."""
    numbers: dict[str, int] = {}
    first, second = (np.array([numbers.setdefault(token, len(numbers)) for token in part]) for part in (one, other))
    longest = 0
    ending_here = np.zeros(len(second) + 1, dtype=np.int64)
    for token in first:
        ending_here[1:] = np.where(second == token, ending_here[:-1] + 1, 0)
        longest = max(longest, int(ending_here.max()))
    return longest


def _cmrc_plain(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in CMRC_PUNCTUATION)


def _cmrc_tokens(text: str) -> list[str]:
    """Han characters one by one; what stands between them is cut as English.

    The official script first splits that into sentences, with a model that has to be downloaded; here each is one.
    """
    from nltk.tokenize import word_tokenize  # takes seconds to import

    plain = _cmrc_plain(text)
    tokens: list[str] = []
    start = 0
    for han in (*CMRC_HAN.finditer(plain), None):
        between = plain[start : han.start() if han else len(plain)]
        tokens += word_tokenize(between, preserve_line=True) if between.strip() else []
        if han:
            tokens.append(han.group())
            start = han.end()
    return tokens


def _squad_words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return ARTICLES.sub(" ", bare).split()


class RougeTokens:
    """Han characters one by one, and else the words that rouge-score takes without stemming: a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return ROUGE_TOKEN.findall(text.lower())


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk, which takes seconds

    return RougeScorer(ROUGE, tokenizer=RougeTokens())


def rouge(reference: str, answer: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L of one answer, as F-measures (Lin 2004, ACL W04-1013)."""
    found = _rouge_scorer().score(reference, answer)
    return {name: float(found[name].fmeasure) for name in ROUGE}


def _matches(references: Sequence[str], texts: Sequence[str]) -> dict[str, Floats]:
    hits = np.array([exact_match(*pair) for pair in zip(references, texts, strict=True)], dtype=np.float64)
    return {"exact_match": with_ones(hits)}


def _f1s(references: Sequence[str], texts: Sequence[str]) -> dict[str, Floats]:
    return {"f1": with_ones(np.array([f1(*pair) for pair in zip(references, texts, strict=True)]))}


def _rouges(references: Sequence[str], texts: Sequence[str]) -> dict[str, Floats]:
    found = [rouge(*pair) for pair in zip(references, texts, strict=True)]
    return {name: with_ones(np.array([row[name] for row in found])) for name in ROUGE}


ROW_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], dict[str, Floats]]] = {
    "exact_match": _matches,
    "f1": _f1s,
    "rouge": _rouges,
}


def _bleu(references: Sequence[str]) -> Any:
    """sacrebleu's BLEU (arXiv:1804.08771). Its `zh` cuts English as well, so that it serves rows of both languages."""
    from sacrebleu.metrics.bleu import BLEU

    chinese = any(language_of(reference) == "zh" for reference in references)
    # Without `force` it warns of generated texts that end in a space and a full stop.
    return BLEU(tokenize="zh" if chinese else "13a", force=True)


def _chrf(references: Sequence[str]) -> Any:
    """sacrebleu's chrF2: character n-grams up to 6, which need no words (Popović 2015, ACL W15-3049)."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


CORPUS_METRICS: dict[str, Callable[[Sequence[str]], Any]] = {"bleu": _bleu, "chrf": _chrf}


def _corpus_rows(metric: Any, references: Sequence[str], texts: Sequence[str]) -> Floats:
    """Counts of n-grams and matches of each row: what sacrebleu sums over a corpus, and its own resampling as well."""
    return np.array(metric._extract_corpus_statistics(texts, [list(references)]), dtype=np.float64)


def _corpus_score(metric: Any, sums: Floats) -> Floats:
    return np.array([metric._compute_score_from_stats([int(one) for one in row]).score / 100 for row in sums])
