from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from ift_peft.data.render import IGNORE
from ift_peft.errors import RunError
from ift_peft.model.tokenizer import TINY
from ift_peft.recipe import Recipe
from ift_peft.report import mask as masks
from ift_peft.report.examples import Text, examples
from ift_peft.report.figures import line_chart, nice_ticks, strips
from ift_peft.report.mask import decoded, window
from ift_peft.report.provenance import Public, is_absolute, place_free
from ift_peft.report.scores import Comparison, Value, blocks, verdict
from ift_peft.report.write import write_report
from ift_peft.run_dir import RunDir, create_run
from tests.report.conftest import HIDDEN, PLACES, part, planted


class Outline(HTMLParser):
    """Tags with their attributes, and the ids of sections."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    @property
    def sections(self) -> list[str | None]:
        return [attributes["id"] for tag, attributes in self.tags if tag == "section"]


def written(run: RunDir) -> str:
    return write_report(run).read_text("utf-8")


def test_markup_in_rows_labels_and_recipe_is_text(full_run: RunDir) -> None:
    page = written(full_run)
    assert "<script" not in page.lower()
    assert not [tag for tag, _ in Outline(page).tags if tag == "script"]
    for place in PLACES:
        assert f"&lt;script&gt;alert(&#39;{place}&#39;)&lt;/script&gt;" in page, place


def test_no_folder_of_the_machine_is_told(full_run: RunDir, tmp_path: Path) -> None:
    page = written(full_run)
    assert "somebody" not in page
    assert "/srv" not in page
    assert str(tmp_path) not in page
    assert "train.jsonl:3" in page
    assert "read from train.jsonl and config.json" in page
    assert f"ift merge runs/planted/{full_run.path.name}" in page


def test_memory_foreseen_is_told_in_gigabytes(full_run: RunDir) -> None:
    assert "memory foreseen for training</dt><dd>2.50 GB<" in written(full_run)


def test_every_section_is_there_with_its_link(full_run: RunDir) -> None:
    outline = Outline(written(full_run))
    expected = ["scores", "classes", "calibration", "unseen", "by-source", "safety", "rows", "trained", "cost"]
    assert outline.sections == [*expected, "findings", "provenance"]
    linked = {attributes["href"] for tag, attributes in outline.tags if tag == "a"}
    assert linked == {f"#{section}" for section in outline.sections}


def test_a_run_that_failed_has_a_report_of_what_there_is(recipe: Recipe, tmp_path: Path) -> None:
    run = create_run(recipe, tmp_path / "runs")
    run.update_manifest(status="failed", error=f"OSError: {HIDDEN}/train.jsonl is gone")
    page = written(run)
    assert Outline(page).sections == ["trained", "provenance"]
    assert "its status is failed" in page
    assert "OSError: train.jsonl is gone" in page


def test_a_broken_file_is_named(full_run: RunDir) -> None:
    (full_run.path / "predictions.jsonl").write_text("{", "utf-8")
    with pytest.raises(RunError, match=r"predictions\.jsonl"):
        write_report(full_run)


def test_answers_are_shown_beside_their_reference(full_run: RunDir) -> None:
    rows = [{"messages": [{"role": "user", "content": f"question {at}"}], "text": None} for at in range(3)]
    gains = (1.0, -4.0, 3.0)
    lines = [
        {
            "row": at,
            "answer": "reference",
            "base": {"log_probability": -10.0, "tokens": 2, "text": "before"},
            "adapter": {"log_probability": -10.0 + 2 * gain, "tokens": 2, "texts": ["after", "other"], "passed": 1},
        }
        for at, gain in enumerate(gains)
    ]
    found = examples(rows, lines)
    assert found is not None
    assert [(one.text.text, one.gain) for one in found.gained] == [("question 2", 3.0), ("question 0", 1.0)]
    assert [(one.text.text, one.gain) for one in found.lost] == [("question 1", -4.0)]
    assert found.gained[0].adapter.answer == Text("after")
    assert found.gained[0].adapter.remark == "1 of 2 passed"
    assert examples(rows, []) is None


@pytest.mark.parametrize(
    ("base", "adapter", "change", "said"),
    [
        ({"accuracy": part(0.4)}, {"accuracy": part(0.8)}, {"accuracy": part(0.4)}, "rose from 0.400 to 0.800"),
        ({"accuracy": part(0.8)}, {"accuracy": part(0.4)}, {"accuracy": part(-0.4)}, "the adapter is worse"),
        ({"accuracy": part(0.4)}, {"accuracy": part(0.42)}, {"accuracy": part(0.02)}, "holds zero"),
        ({"loss": part(2.0)}, {"loss": part(1.0)}, {"loss": part(-1.0)}, "the adapter is better"),
    ],
)
def test_the_verdict_says_which_way_and_whether_it_is_clear(
    recipe: Recipe, base: object, adapter: object, change: object, said: str
) -> None:
    found = verdict(recipe, {"rows": 1234, "base": base, "adapter": adapter, "change": change})
    assert found is not None
    assert said in found.sentence
    assert "On 1,234 held-out rows" in found.sentence


def test_the_verdict_is_on_the_metric_that_has_a_target(recipe: Recipe) -> None:
    evaluation = recipe.evaluation.model_copy(update={"target": {"f1": 0.5}})
    sides = {who: {"accuracy": part(0.5), "f1": part(0.3)} for who in ("base", "adapter", "change")}
    found = verdict(recipe.model_copy(update={"evaluation": evaluation}), {"rows": 1, **sides})
    assert found is not None
    assert found.comparison.metric == "f1"


def test_scores_are_found_whichever_way_they_are_nested() -> None:
    sides = {"base": part(1), "adapter": part(2), "change": part(1)}
    by_side = {who: {"rate": value} for who, value in sides.items()}
    (inner,) = blocks({"rate": sides})
    (outer,) = blocks(by_side)
    assert inner.comparisons == outer.comparisons
    (deep,) = blocks({"a": {"b": {"rows": 3, **by_side}}})
    assert deep.title == "a: b"
    assert deep.facts == (("rows", "3"),)
    assert deep.comparisons == outer.comparisons


TEXTS = ("鲜掉眉毛！🍜𠮷野家", "naïve café — don't\nstop  here\n", "ᚠᛇᚻ 한국어 🏳️‍🌈")


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_joined_are_the_text_and_supervision_never_shares_a_piece(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    for first in range(len(ids) + 1):
        labels = [IGNORE] * first + ids[first:]
        pieces = decoded(ids, labels, lambda part: tokenizer.decode(list(part), skip_special_tokens=False))
        assert sum(piece.tokens for piece in pieces) == len(ids)
        assert sum(piece.tokens for piece in pieces if piece.supervised) == len(ids) - first
        if first in (0, len(ids)):
            assert "".join(piece.text for piece in pieces).replace("↵\n", "\n") == text


def test_a_long_golden_example_is_shown_where_it_is_supervised() -> None:
    labels = [IGNORE] * 5000 + [1, 2, 3] + [IGNORE] * 50
    shown = labels[window(labels)]
    assert len(shown) == masks.MOST_TOKENS
    assert shown[-3:] == [1, 2, 3]
    assert masks.IGNORE == IGNORE


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (2.97, 4.38), (-3.0, 12.0), (1e-6, 3e-6), (5.0, 5.0), (0.0, 1e6)]
)
def test_ticks_cover_the_values_and_are_few_and_even(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
    steps = [after - before for before, after in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_strips_place_values_on_the_scale_of_their_ticks() -> None:
    rate = Comparison("accuracy", Value(0.25, 0.0, 0.5), Value(1.0), None)
    odd = Comparison("nats", Value(3.0), Value(7.0), None)
    first, second = strips([rate, odd])
    assert [(one.low, one.at, one.high) for one in first.whiskers] == [(0, 25, 50), (100, 100, 100)]
    ticks = {float(tick.text): tick.at for tick in second.ticks}
    assert [one.at for one in second.whiskers] == pytest.approx([ticks[3.0], ticks[7.0]])
    same = strips([rate, rate])
    assert [bool(one.ticks) for one in same] == [False, True]


def test_a_curve_ends_where_training_ends_and_long_ones_are_thinned() -> None:
    chart = line_chart("training loss", [(float(step), 1000.0 / step) for step in range(1, 5001)])
    points = [tuple(map(float, point.split(","))) for point in chart.path.split()]
    assert chart.logarithmic
    assert len(points) <= 500
    assert all(0 <= x <= 1000 and 0 <= y <= 1000 for x, y in points)
    assert [y for _, y in points] == sorted(y for _, y in points), "a falling loss falls on the page"
    assert "from 1,000 at step 1 to 0.200 at step 5,000" in chart.alternative


def test_paths_are_told_from_texts_that_begin_like_them() -> None:
    assert is_absolute("/data/rows.jsonl")
    assert is_absolute("C:\\rows\\train.csv")
    assert not is_absolute("/no_think")
    assert not is_absolute("one/other")
    assert place_free({"a": ["/data/my rows/x.jsonl", "Qwen/Qwen3-0.6B"]}) == {"a": ["x.jsonl", "Qwen/Qwen3-0.6B"]}
    public = Public(("/data/my rows",))
    assert public.text("same as /data/my rows/x.jsonl:3, see https://example.org/a/b") == (
        "same as x.jsonl:3, see https://example.org/a/b"
    )


def test_the_recipe_in_the_page_is_whole_but_for_places(full_run: RunDir) -> None:
    page = written(full_run)
    for name in ("train.jsonl", "bootstrap_samples", "lora_alpha"):
        assert name in page
    assert re.search(r"training\.seed</dt><dd>7<", page)
    assert json.loads((full_run.path / "manifest.json").read_text("utf-8"))["versions"]["trl"] in page
    assert planted("text") not in page


def test_rows_of_a_mix_are_set_side_by_side_by_the_likelihood_of_their_answers() -> None:
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("a review", "a question")]
    likelihoods = [{"log_probability": -4.0, "tokens": 2}, {"log_probability": -1.0, "tokens": 2}]
    sides = dict(zip(("base", "adapter"), likelihoods, strict=True))
    labelled = {"row": 0, "answer": "good", "base": {"good": 0.4, "bad": 0.6}, "adapter": {"good": 0.9, "bad": 0.1}}
    lines = [
        {**labelled, "likelihood": {"base": likelihoods[1], "adapter": likelihoods[0]}},
        {"row": 1, "answer": "yes", **sides},
    ]
    found = examples(rows, lines)
    assert found is not None
    assert [(one.text.text, one.gain) for one in found.gained] == [("a question", 1.5)]
    assert [(one.text.text, one.gain) for one in found.lost] == [("a review", -1.5)]
    assert found.lost[0].adapter.answer is not None
    assert (found.lost[0].adapter.answer.text, found.lost[0].adapter.remark) == ("good", "right")
