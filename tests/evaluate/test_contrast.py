"""Comparing runs, on folders made by hand whose truth is known."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from ift_peft.errors import RunError
from ift_peft.evaluate.charts import Curve, curve_chart, interval_chart
from ift_peft.evaluate.contrast import Contrast, contrast, holm, resample, two_sided_p
from ift_peft.evaluate.intervals import Estimate
from ift_peft.evaluate.metrics import Resampling
from ift_peft.recipe import Recipe
from ift_peft.run_dir import RunDir, create_run

Hits = Sequence[bool]


def lines_of(hits: Hits, **more: Any) -> list[dict[str, Any]]:
    right, wrong = {"负面": 0.2, "正面": 0.8}, {"负面": 0.8, "正面": 0.2}
    return [
        {"row": row, "answer": "正面", "base": wrong, "adapter": right if hit else wrong, **more}
        for row, hit in enumerate(hits)
    ]


def made(
    root: Path, name: str, hits: Hits, *, seed: int = 0, text: str = "好", **probes: list[dict[str, Any]]
) -> RunDir:
    data = {"train": "/x/rows.jsonl", "labels": ["负面", "正面"]}
    run = create_run(Recipe.model_validate({"name": name, "data": data, "training": {"seed": seed}}), root)
    run.update_manifest(status="succeeded", inputs={"base_fingerprint": "b", "template_sha256": "t"})
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "正面"}]
    run.write_lines("test.jsonl", [{"messages": messages, "where": f"rows.jsonl:{row}"} for row in range(len(hits))])
    run.write_lines("predictions.jsonl", lines_of(hits))
    for probe, lines in probes.items():
        run.write_lines(f"predictions-{probe}.jsonl", lines)
    return run


def drawn(rate: float, rows: int, seed: int) -> Hits:
    return list(map(bool, np.random.default_rng(seed).random(rows) < rate))


def compared(runs: Sequence[RunDir], samples: int = 2000) -> Contrast:
    return contrast(runs, Resampling(samples, 0.95, 0))


def test_equal_arms_do_not_differ(tmp_path: Path) -> None:
    hits = drawn(0.7, 200, 1)
    result = compared([made(tmp_path, "a", hits), made(tmp_path, "b", hits)])
    (difference,) = result.probes[0].differences
    assert (difference.estimate.value, difference.estimate.low, difference.estimate.high) == (0, 0, 0)
    assert difference.p == 1


def test_a_difference_is_found_with_its_sign_and_the_interval_of_theory(tmp_path: Path) -> None:
    rows = 1000
    first, second = drawn(0.7, rows, 1), drawn(0.8, rows, 2)
    runs = [made(tmp_path, "a", first), made(tmp_path, "b", second)]
    (difference,) = compared(runs).probes[0].differences
    changes = np.array(second, float) - np.array(first, float)
    half = 1.96 * changes.std() / np.sqrt(rows)
    assert difference.estimate.value == pytest.approx(changes.mean())
    assert difference.estimate.low == pytest.approx(changes.mean() - half, abs=0.005)
    assert difference.estimate.high == pytest.approx(changes.mean() + half, abs=0.005)
    assert difference.p < 0.01
    (swapped,) = compared(runs[::-1]).probes[0].differences
    assert swapped.estimate.value == pytest.approx(-difference.estimate.value)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        totals = (rng.random((150, 2)) < 0.75).astype(float)
        means = resample(totals, np.ones_like(totals), [[0], [1]], samples=400, seed=trial)
        low, high = np.percentile(means[:, 1] - means[:, 0], [2.5, 97.5])
        held += low <= 0 <= high
    assert 0.90 <= held / 200 <= 0.99


def test_intervals_hold_the_truth_where_the_seed_matters() -> None:
    """Three runs an arm, of one procedure: rows easy and hard, runs good and bad."""
    rng = np.random.default_rng(1)
    held, alone, trials = 0, 0, 150
    for trial in range(trials):
        easy, skill = 1.5 * rng.normal(size=(300, 1)), 1 + 0.3 * rng.normal(size=(1, 6))
        totals = (rng.random((300, 6)) < 1 / (1 + np.exp(-easy - skill))).astype(float)
        for members in ([[0, 1, 2], [3, 4, 5]], [[0], [3]]):
            means = resample(totals, np.ones_like(totals), members, samples=300, seed=trial)
            low, high = np.percentile(means[:, 1] - means[:, 0], [2.5, 97.5])
            held += len(members[0]) == 3 and low <= 0 <= high
            alone += len(members[0]) == 1 and low <= 0 <= high
    assert held / trials >= 0.90
    assert alone / trials < 0.80  # one run an arm: rows alone are resampled, and the notes say so


def test_runs_that_differ_in_their_seed_are_one_arm_whose_interval_counts_the_seeds(tmp_path: Path) -> None:
    rates = (0.6, 0.75, 0.9)
    runs = [made(tmp_path, "a", drawn(rate, 400, at), seed=at) for at, rate in enumerate(rates)]
    pooled = compared(runs)
    assert [(arm.name, len(arm.runs)) for arm in pooled.arms] == [("a", 3)]
    (score,) = pooled.probes[0].scores
    assert score.estimate.value == pytest.approx(np.mean(score.by_run))
    single = compared(runs[:1]).probes[0].scores[0].estimate
    assert score.estimate.high - score.estimate.low > 1.5 * (single.high - single.low)
    again = compared([*runs, made(tmp_path, "a", drawn(0.1, 400, 9), seed=0)])
    assert any("same settings and seeds" in note for note in again.notes)


def test_phrasings_of_a_row_are_one_draw(tmp_path: Path) -> None:
    hits = drawn(0.7, 100, 3)
    many = [line for number in range(6) for line in lines_of(hits, instruction=number)]
    (probe,) = (p for p in compared([made(tmp_path, "a", hits, unseen=many)]).probes if p.name == "unseen phrasings")
    plain = compared([made(tmp_path, "b", hits)]).probes[0]
    assert probe.rows == 100
    assert probe.scores[0].estimate == plain.scores[0].estimate


def test_runs_on_other_rows_are_refused_by_name(tmp_path: Path) -> None:
    runs = [made(tmp_path, "a", drawn(0.7, 50, 1)), made(tmp_path, "b", drawn(0.7, 40, 1))]
    with pytest.raises(RunError, match="other rows than those of a/"):
        compared(runs)


def other_test_rows(run: RunDir, **changes: Any) -> None:
    path = run.path / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    run.write_lines(path.name, [{**row, **changes} for row in rows])


def test_rows_are_the_same_by_their_text_however_it_was_asked_about(tmp_path: Path) -> None:
    hits = drawn(0.7, 50, 1)
    runs = [made(tmp_path, "a", hits, text="判断：好喝"), made(tmp_path, "b", hits, text="好喝，正面吗？")]
    for run in runs:
        other_test_rows(run, text="好喝")
    assert len(compared(runs).arms) == 2
    other_test_rows(runs[1], text="好")  # cut to fit, from the same line of the file
    assert len(compared(runs).arms) == 2
    other_test_rows(runs[1], text="难喝")
    with pytest.raises(RunError, match="other rows than those of a/"):
        compared(runs)


def with_losses(run: RunDir, losses: Sequence[float], tokens: Sequence[int] | None) -> RunDir:
    lines: list[dict[str, Any]] = []
    for row, loss in enumerate(losses):
        adapter = {"log_probability": -loss, **({} if tokens is None else {"tokens": tokens[row]})}
        lines.append({"row": row, "answer": "好", "adapter": adapter})
    run.write_lines("predictions.jsonl", lines)
    return run


@pytest.mark.parametrize(
    ("tokens", "metric", "values"),
    [
        (([1, 2, 3, 4], [1, 2, 3, 4]), "loss in nats per token", [2, 1]),
        (([1, 2, 3, 4], [4, 3, 2, 1]), "loss in nats per answer", [5, 2.5]),
        ((None, None), "loss in nats per answer", [5, 2.5]),
    ],
)
def test_losses_are_by_token_where_all_runs_count_the_same_tokens(
    tmp_path: Path, tokens: tuple[Sequence[int] | None, ...], metric: str, values: list[float]
) -> None:
    hits, losses = drawn(0.7, 4, 1), ([2.0, 4, 6, 8], [1.0, 2, 3, 4])
    runs = [with_losses(made(tmp_path, name, hits), *given) for name, *given in zip("ab", losses, tokens, strict=True)]
    probe = compared(runs).probes[0]
    assert probe.metric == metric
    assert [score.estimate.value for score in probe.scores] == pytest.approx(values)
    assert probe.differences[0].estimate.value == pytest.approx(values[1] - values[0])
    with pytest.raises(RunError, match="one kind of task"):
        compared([runs[0], made(tmp_path, "classes", hits)])


def test_arms_of_one_recipe_are_named_by_what_differs(tmp_path: Path) -> None:
    hits = drawn(0.7, 50, 1)
    one = made(tmp_path, "a", hits)
    other = made(tmp_path, "a", hits)
    text = (other.path / "recipe.yaml").read_text("utf-8").replace("max_train_rows: null", "max_train_rows: 300")
    (other.path / "recipe.yaml").write_text(text, "utf-8")
    names = [arm.name for arm in compared([one, other]).arms]
    assert names == ["a (data.max_train_rows=unset)", "a (data.max_train_rows=300)"]


def test_p_values_and_their_adjustment() -> None:
    assert two_sided_p(np.full(999, 0.1)) == pytest.approx(2 / 1000)
    assert two_sided_p(np.zeros(999)) == 1
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_charts_are_xml_without_outside_references_and_equal_for_equal_input(tmp_path: Path) -> None:
    hits = drawn(0.7, 50, 1)
    result = compared([made(tmp_path, "a", hits), made(tmp_path, "b", hits[::-1])])
    for name in ("one.svg", "two.svg"):
        interval_chart(result, tmp_path / name, title="比较")
    one = (tmp_path / "one.svg").read_text("utf-8")
    assert one == (tmp_path / "two.svg").read_text("utf-8")
    assert "比较" in one
    curve = Curve("a", (100, 300), (Estimate(0.6, 0.5, 0.7), Estimate(0.7, 0.6, 0.8)), ((0.6,), (0.7, 0.7)))
    curve_chart([curve], tmp_path / "curve.svg", title="学习曲线", metric="accuracy", reference=("base", 0.5))
    for name in ("one.svg", "curve.svg"):
        text = (tmp_path / name).read_text("utf-8")
        ElementTree.fromstring(text)
        links = re.findall(r'(?:href|src)="([^"#][^"]*)"', text)
        assert links == []
    json.dumps(result.to_json())
