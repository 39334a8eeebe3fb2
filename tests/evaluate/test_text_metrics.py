from __future__ import annotations

import json
import re
import string
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from nltk.tokenize import NLTKWordTokenizer
from peft import LoraConfig, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from transformers import AutoModelForCausalLM, AutoTokenizer

from ift_peft.console import out, print_scores
from ift_peft.data.render import Renderer
from ift_peft.data.row import Row
from ift_peft.errors import RecipeError
from ift_peft.evaluate.calibration import calibration_scores
from ift_peft.evaluate.compare import Answers, Predictions, compare, prediction_lines
from ift_peft.evaluate.measure import measure
from ift_peft.evaluate.metrics import Resampling
from ift_peft.evaluate.rowwise import compared, mean, with_ones
from ift_peft.evaluate.text_metrics import exact_match, f1, longest_common_run, rouge, text_scores
from ift_peft.model.tokenizer import TINY
from ift_peft.reporter import Silent
from ift_peft.sections import Evaluation

FEW = Resampling(samples=300)
CHINESE = [  # reference, answer
    ("北京大学", "北京大学"),
    ("北京大学", "清华大学。"),
    ("《红楼梦》", "红楼梦"),
    ("1984年5月12日", "1984 年 5 月"),
    ("使用 GPU-A100 训练了 3.5 天", "训练了3.5天，用 GPU A100"),
    ("他说：“你好”……然后走了", "他说你好然后走了！"),
    ("中国,广东", "中国广东"),
    ("Python语言是guido van rossum发明的", "Guido van Rossum 发明了Python 语言"),
    ("天气很好", ""),
    ("他说 don't worry, 没事的 it's ok.", "没事的，don't worry"),
]
ENGLISH = [
    ("The Eiffel Tower", "eiffel tower"),
    ("the cat sat on the mat", "a cat sat on a mat."),
    ("$1,234.50", "1234.50 dollars"),
    ("in 1984, in London", "London in 1984"),
    ("the", "a"),
    ("yes", ""),
    ("New York City", "los angeles"),
]


def cmrc_segments(text: str) -> list[str]:
    """Transcribed from the description of the official script of CMRC 2018, without its splitting into sentences."""
    special = [*"-:_*^/\\~`+=，。：？！“”；’《》", "……", *"·、「」（）－～『』"]
    segments: list[str] = []
    waiting = ""
    for character in text.lower().strip():
        if character in special:
            continue
        if re.search("[\u4e00-\u9fa5]", character):
            if waiting != "":
                segments.extend(NLTKWordTokenizer().tokenize(waiting))
                waiting = ""
            segments.append(character)
        else:
            waiting += character
    if waiting != "":
        segments.extend(NLTKWordTokenizer().tokenize(waiting))
    return segments


def cmrc_f1(reference: str, answer: str) -> float:
    wanted, found = cmrc_segments(reference), cmrc_segments(answer)
    best = 0
    for start in range(len(wanted)):
        for end in range(start + 1, len(wanted) + 1):
            if any(found[at : at + end - start] == wanted[start:end] for at in range(len(found))):
                best = max(best, end - start)
    if best == 0:
        return 0.0
    precision, recall = 1.0 * best / len(found), 1.0 * best / len(wanted)
    return (2 * precision * recall) / (precision + recall)


def cmrc_em(reference: str, answer: str) -> bool:
    special = "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"
    plain = [text.lower().strip().translate({ord(one): None for one in special}) for text in (reference, answer)]
    return plain[0] == plain[1]


def squad_plain(text: str) -> str:
    text = text.lower()
    text = "".join(one for one in text if one not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_f1(reference: str, answer: str) -> float:
    gold, predicted = squad_plain(reference).split(), squad_plain(answer).split()
    same = sum((Counter(gold) & Counter(predicted)).values())
    if not gold or not predicted:
        return float(gold == predicted)
    if same == 0:
        return 0.0
    return 2 * (same / len(predicted)) * (same / len(gold)) / (same / len(predicted) + same / len(gold))


@pytest.mark.parametrize("pair", CHINESE)
def test_chinese_answers_are_scored_as_in_cmrc(pair: tuple[str, str]) -> None:
    reference, answer = pair
    assert f1(reference, answer) == cmrc_f1(reference, answer)
    assert exact_match(reference, answer) == cmrc_em(reference, answer)


def test_chinese_scores_by_hand() -> None:
    assert f1("北京大学", "清华大学。") == pytest.approx(0.5)
    assert f1("北京大学", "大学在北京") == pytest.approx(2 * (2 / 5) * (2 / 4) / (2 / 5 + 2 / 4))
    assert f1("共用了 GPU 十天", "十天 gpu") == pytest.approx(2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6))
    assert exact_match("《红楼梦》", "红楼梦。")
    assert not exact_match("中国,广东", "中国广东")  # the script leaves ASCII commas in
    assert exact_match("ＧＰＵ 很快", "ＧＰＵ 很快")


@pytest.mark.parametrize("pair", ENGLISH)
def test_english_answers_are_scored_as_in_squad(pair: tuple[str, str]) -> None:
    assert f1(*pair) == squad_f1(*pair)
    assert exact_match(*pair) == (squad_plain(pair[0]) == squad_plain(pair[1]))


def test_the_longest_common_run_has_no_gaps() -> None:
    assert longest_common_run("abcdef", "xbcdxef") == 3
    assert longest_common_run("", "a") == longest_common_run("a", "") == longest_common_run("", "") == 0
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = ("".join(rng.choice(list("ab"), size=12)) for _ in range(2))
        slow = max(end - start for start in range(12) for end in range(start, 13) if one[start:end] in other)
        assert longest_common_run(one, other) == slow


def scores_of(pairs: list[tuple[str, str]], names: tuple[str, ...]) -> Any:
    references, answers = [one for one, _ in pairs], [other for _, other in pairs]
    return text_scores(references, answers[::-1], answers, names=names, resampling=FEW)


@pytest.mark.parametrize(
    ("pairs", "tokenize"),
    [
        ([(one * 2, (other or "天") * 2) for one, other in CHINESE[:8]], "zh"),
        (ENGLISH, "13a"),
        (ENGLISH + CHINESE, "zh"),
        ([("他来了。", "她走了。")], "zh"),
        ([("no match at all", "")], "13a"),
    ],
)
def test_bleu_and_chrf_are_sacrebleus(pairs: list[tuple[str, str]], tokenize: str) -> None:
    scores = scores_of(pairs, ("bleu", "chrf"))
    references, answers = [one for one, _ in pairs], [other for _, other in pairs]
    for name, metric in (("bleu", BLEU(tokenize=tokenize)), ("chrf", CHRF())):
        assert scores.adapter[name].value == pytest.approx(metric.corpus_score(answers, [references]).score / 100)
        assert scores.base[name].value == pytest.approx(metric.corpus_score(answers[::-1], [references]).score / 100)
        assert scores.signatures[name] == str(metric.get_signature())
    assert f"tok:{tokenize}" in scores.signatures["bleu"]


def test_the_interval_of_bleu_is_as_wide_as_sacrebleus() -> None:
    rng = np.random.default_rng(0)
    words = ["the", "a", "cat", "dog", "sat", "on", "mat", "house", "with", "red", "blue", "and", "ran", "to"]
    references = [" ".join(rng.choice(words, size=12)) for _ in range(80)]
    answers = [" ".join(w if rng.random() < 0.7 else "x" for w in line.split()) for line in references]
    theirs = BLEU().corpus_score(answers, [references], n_bootstrap=1000)
    ours = text_scores(references, answers, answers, names=("bleu",), resampling=Resampling()).adapter["bleu"]
    assert (ours.high - ours.low) / 2 == pytest.approx(theirs._ci / 100, rel=0.15)


def test_rouge_is_rouge_scores() -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
    for pair in (*ENGLISH, ("The quick brown fox, jumps over 3 dogs.", "a quick dog jumps over the brown fox")):
        theirs = scorer.score(*pair)
        assert rouge(*pair) == {name: theirs[name].fmeasure for name in theirs}
    for pair in CHINESE:
        spelt = [re.sub("[\u4e00-\u9fff]", lambda found: f" han{ord(found.group())} ", text) for text in pair]
        theirs = scorer.score(*spelt)
        assert rouge(*pair) == {name: theirs[name].fmeasure for name in theirs}


def test_rouge_of_chinese_by_hand() -> None:
    found = rouge("今天天气很好", "今天很好")
    assert found["rouge1"] == pytest.approx(2 * 1.0 * (4 / 6) / (1 + 4 / 6))
    assert found["rouge2"] == pytest.approx(2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5))
    assert found["rougeL"] == pytest.approx(2 * 1.0 * (4 / 6) / (1 + 4 / 6))


ALL = ("exact_match", "f1", "bleu", "chrf", "rouge")


@pytest.mark.parametrize("pairs", [CHINESE, ENGLISH, CHINESE + ENGLISH])
def test_every_score_lies_in_its_interval_between_0_and_1(pairs: list[tuple[str, str]]) -> None:
    scores = scores_of(pairs, ALL)
    names = ["exact_match", "f1", "bleu", "chrf", "rouge1", "rouge2", "rougeL"]
    assert list(scores.adapter) == list(scores.base) == list(scores.change) == names
    for name in names:
        for who in (scores.base, scores.adapter, scores.change):
            told = who[name].to_json()
            assert told["low"] <= told["value"] <= told["high"]
        assert 0 <= scores.adapter[name].low <= scores.adapter[name].high <= 1
        change = scores.adapter[name].value - scores.base[name].value
        assert scores.change[name].value == pytest.approx(change, abs=1e-9)


def test_equal_answers_are_no_change_and_right_ones_score_1() -> None:
    references = [one for one, _ in CHINESE[:8]]
    answers = [other for _, other in CHINESE[:8]]
    same = text_scores(references, answers, answers, names=ALL, resampling=FEW)
    for change in same.change.values():
        assert (change.value, change.low, change.high) == (0.0, 0.0, 0.0)
    right = text_scores(references, answers, references, names=ALL, resampling=FEW)
    assert [right.adapter[name].value for name in right.adapter] == pytest.approx([1.0] * 7)
    assert right.adapter["exact_match"].low < 1  # eight rows are not certainty


def test_a_paired_change_is_narrower_than_the_intervals_apart() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(200)
    found = compared(with_ones(base), with_ones(base + 0.1), score=mean, resampling=FEW)
    assert found.change.value == pytest.approx(0.1)
    assert found.change.high - found.change.low == pytest.approx(0, abs=1e-9)
    assert found.base.high - found.base.low == pytest.approx(4 * base.std() / 200**0.5, rel=0.15)


def given(seed: int, *, rows: int = 400, classes: int = 3) -> tuple[list[int], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet([0.6] * classes, size=rows)
    truth = [
        int(rng.choice(classes, p=row)) if rng.random() < 0.8 else int(rng.integers(classes)) for row in probabilities
    ]
    return truth, probabilities


def test_calibration_is_scikit_learns_and_the_definition() -> None:
    truth, probabilities = given(0)
    scores = calibration_scores(truth, probabilities, probabilities, FEW)
    adapter = scores["adapter"]
    assert adapter["nll"]["value"] == pytest.approx(log_loss(truth, probabilities), abs=1e-6)
    theirs = brier_score_loss(truth, probabilities, scale_by_half=False, labels=[0, 1, 2])
    assert adapter["brier"]["value"] == pytest.approx(theirs, abs=1e-6)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    accuracies, confidences = calibration_curve(right, confidence, n_bins=15, strategy="uniform")
    bins = scores["bins"]["adapter"]
    assert [one["accuracy"] for one in bins] == pytest.approx(list(accuracies), abs=1e-6)
    assert [one["confidence"] for one in bins] == pytest.approx(list(confidences), abs=1e-6)
    expected = sum(one["rows"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / len(truth)
    assert adapter["ece"]["value"] == pytest.approx(expected, abs=1e-5)
    by_loop = 0.0
    for number in range(15):
        inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if inside.any():
            by_loop += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert adapter["ece"]["value"] == pytest.approx(by_loop, abs=1e-6)
    assert sum(one["rows"] for one in bins) == len(truth)


@pytest.mark.parametrize("seed", range(5))
def test_calibration_lies_in_its_intervals(seed: int) -> None:
    truth, adapter = given(seed)
    base = np.full_like(adapter, 1 / 3)
    scores = calibration_scores(truth, base, adapter, FEW)
    for who in ("base", "adapter", "change"):
        for value in scores[who].values():
            assert value["low"] <= value["value"] <= value["high"]
    same = calibration_scores(truth, adapter, adapter, FEW)["change"]
    assert all(part == {"value": 0.0, "low": 0.0, "high": 0.0} for part in same.values())


def test_a_certain_classifier() -> None:
    right = calibration_scores([0, 1], np.eye(2), np.eye(2), FEW)["adapter"]
    assert {name: part["value"] for name, part in right.items()} == {"ece": 0.0, "brier": 0.0, "nll": 0.0}
    wrong = calibration_scores([1, 0], np.eye(2), np.eye(2), FEW)["adapter"]
    assert wrong["ece"]["value"] == 1.0
    assert wrong["brier"]["value"] == 2.0
    assert np.isfinite(wrong["nll"]["value"])


def row(question: str, answer: str) -> Row:
    return Row(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), "rows:1")


def test_metrics_of_answers_stand_beside_loss_and_perplexity() -> None:
    rows = [row("?", "北京大学"), row("?", "the red house"), row("?", "好")]
    likelihoods = {"log_probabilities": np.array([-2.0, -3.0, -1.0]), "tokens": np.array([3.0, 4.0, 2.0])}
    names = ("exact_match", "bleu", "pass_at_k")
    base = Predictions(
        **likelihoods, answers=Answers([["x", "北京大学"], ["y", "y"], ["z", "z"]], names, [1, 0, 0], (1, 2))
    )
    adapter = Predictions(
        **likelihoods,
        answers=Answers([["北京大学", "x"], ["blue house", "the red house"], ["好", "好"]], names, [1, 0, 2], (1, 2)),
    )
    scores = compare(rows, (), base, adapter, FEW)
    assert list(scores["adapter"]) == ["loss", "perplexity", "exact_match", "bleu", "pass@1", "pass@2"]
    assert scores["adapter"]["exact_match"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert scores["base"]["exact_match"]["value"] == 0
    assert scores["adapter"]["pass@1"]["value"] == 0.5
    assert scores["adapter"]["pass@2"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert scores["change"]["pass@2"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert "tok:zh" in scores["signatures"]["bleu"]
    lines = prediction_lines(rows, (), base, adapter)
    assert lines[0]["adapter"] == {"log_probability": -2.0, "tokens": 3, "texts": ["北京大学", "x"], "passed": 1}
    json.dumps([scores, lines])
    with out.capture() as printed:
        print_scores(scores, title="title")
    for name in ("loss", "exact_match", "bleu", "pass@1", "tok:zh"):
        assert name in printed.get()


def test_one_answer_to_a_row_is_its_text() -> None:
    one = Predictions(
        log_probabilities=np.array([-1.0]), tokens=np.array([2.0]), answers=Answers([["hello"]], ("exact_match",))
    )
    (line,) = prediction_lines([row("?", "hello")], (), one, one)
    assert line["base"] == {"log_probability": -1.0, "tokens": 2, "text": "hello"}


def test_a_classifier_is_scored_with_its_calibration() -> None:
    rows = [row("?", "yes"), row("?", "no"), row("?", "no")]
    base = Predictions(probabilities=np.array([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8]]))
    adapter = Predictions(probabilities=np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9]]))
    scores = compare(rows, ("yes", "no"), base, adapter, FEW)
    assert scores["calibration"]["adapter"]["brier"]["value"] < scores["calibration"]["base"]["brier"]["value"]
    with out.capture() as printed:
        print_scores(scores, title="title")
    for name in ("accuracy", "ece", "brier", "nll"):
        assert name in printed.get()


def test_base_and_adapter_are_asked_and_their_programs_run() -> None:
    """Tests that always pass and never pass, so that what is written does not matter."""
    renderer = Renderer(AutoTokenizer.from_pretrained(TINY))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY), LoraConfig(target_modules="all-linear"))
    rows = [row("请用一句话回答：天空是什么颜色？", "蓝色"), row("What colour is grass?", "green")]
    section = Evaluation(metrics=("f1", "chrf", "rouge", "pass_at_k"), max_new_tokens=8, samples=2, temperature=1.0)
    rows = [replace(one, tests=tests) for one, tests in zip(rows, ("pass", "raise ValueError"), strict=True)]
    base, adapter = (
        measure(model, renderer, rows, (), section, adapter=who, reporter=Silent()) for who in (False, True)
    )
    assert adapter.answers is not None
    assert [len(samples) for samples in adapter.answers.texts] == [2, 2]
    scores = compare(rows, (), base, adapter, FEW)
    assert "pass@1" in scores["adapter"]
    for name, part in scores["change"].items():  # a fresh adapter changes nothing
        assert (name, part["value"]) == (name, 0)
    probe = measure(model, renderer, rows, (), section, adapter=True, reporter=Silent(), what="a probe")
    assert probe.answers is None


@pytest.mark.parametrize(("labels", "names"), [(("a", "b"), ("f1",)), ((), ("pass_at_k",))])
def test_metrics_that_do_not_fit_the_task_are_refused(labels: tuple[str, ...], names: tuple[Any, ...]) -> None:
    with pytest.raises(RecipeError, match=r"evaluation\.metrics"):
        measure(
            None,
            None,  # type: ignore[arg-type]
            [row("?", "a")],
            labels,
            Evaluation(metrics=names),
            adapter=False,
            reporter=Silent(),
        )


@pytest.mark.parametrize("fields", [{"samples": 2}, {"pass_at": (5,)}, {"pass_at": ()}, {"metrics": ("bleurt",)}])
def test_settings_that_contradict_each_other_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"temperature|pass_at|metrics"):
        Evaluation(**fields)
