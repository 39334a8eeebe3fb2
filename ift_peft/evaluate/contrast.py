"""Runs against each other: arms of pooled seeds, and the difference of every two arms, with intervals and p-values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ift_peft.errors import RunError
from ift_peft.evaluate.arms import Arm, group, read_lines, require_same_rows, short
from ift_peft.evaluate.intervals import Estimate, Floats, percentile
from ift_peft.evaluate.metrics import Resampling
from ift_peft.recipe import Recipe
from ift_peft.run_dir import RunDir

HELD_OUT = "held-out"
PROBES = {
    HELD_OUT: "predictions.jsonl",
    "unseen phrasings": "predictions-unseen.jsonl",
    "perturbed text": "predictions-perturbed.jsonl",
}
ACCURACY, PER_TOKEN, PER_ANSWER = "accuracy", "loss in nats per token", "loss in nats per answer"
DRAWN_AT_ONCE = 4_000_000  # row numbers: 32 MB


@dataclass(frozen=True)
class ArmScore:
    """What an arm scored: the mean over its runs, and each run's own value."""

    arm: str
    estimate: Estimate
    by_run: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """`second` minus `first`."""

    first: str
    second: str
    estimate: Estimate
    p: float
    adjusted_p: float


@dataclass(frozen=True)
class Probe:
    """The scores of all arms on the same rows asked in one manner."""

    name: str
    metric: str
    rows: int
    scores: tuple[ArmScore, ...]
    differences: tuple[Difference, ...]

    def to_json(self) -> dict[str, Any]:
        scores = {
            one.arm: {**one.estimate.to_json(), "by_run": [round(value, 6) for value in one.by_run]}
            for one in self.scores
        }
        differences = [
            {
                "of": one.second,
                "from": one.first,
                **one.estimate.to_json(),
                "p": round(one.p, 6),
                "adjusted_p": round(one.adjusted_p, 6),
            }
            for one in self.differences
        ]
        return {"metric": self.metric, "rows": self.rows, "scores": scores, "differences": differences}


@dataclass(frozen=True)
class Contrast:
    """Arms, and what each probe says of them."""

    arms: tuple[Arm, ...]
    probes: tuple[Probe, ...]
    notes: tuple[str, ...]
    resampling: Resampling

    def describe(self) -> str:
        """How intervals and p-values were made."""
        asked = any(probe.name in PROBES and probe.name != HELD_OUT for probe in self.probes)
        rows = "rows, each with all its phrasings" if asked else "rows"
        seeds = ", and over the runs of each arm" if any(len(arm.runs) > 1 for arm in self.arms) else ""
        drawn = self.resampling
        text = f"{100 * drawn.confidence:g} % intervals: bootstrap over {rows}{seeds} ({drawn.samples} resamples)"
        pairs = len(self.probes[0].differences)
        if pairs:
            text += ";\ndifferences are paired: all arms on the same resampled rows; p is two-sided"
        return f"{text}, Holm-adjusted for the {pairs} pairs of a probe" if pairs > 1 else text

    def to_json(self) -> dict[str, Any]:
        return {
            "arms": {arm.name: [short(run) for run in arm.runs] for arm in self.arms},
            "probes": {probe.name: probe.to_json() for probe in self.probes},
            "intervals": self.describe(),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Table:
    """Of each row (all its phrasings together) in each run: the summed score and what it is summed over."""

    metric: str
    totals: Floats
    counts: Floats

    @property
    def by_run(self) -> Floats:
        means: Floats = self.totals.sum(axis=0) / self.counts.sum(axis=0)
        return means


def contrast(runs: Sequence[RunDir], resampling: Resampling) -> Contrast:
    """What the adapters of `runs` score on the probes that all of them have, by arm, and how the arms differ.

    Runs that differ only in seeds are one arm and count as draws of one training procedure. Raises `RunError` where
    held-out rows, or the kind of task, are not the same in all runs.
    """
    if not runs:
        raise RunError(expected="runs to compare", found="none", fix="name run folders (ift runs)")
    arms, notes = group(runs)
    kept = [run for arm in arms for run in arm.runs]
    require_same_rows(kept)
    probes = []
    for name, file in PROBES.items():
        lacking = [run for run in kept if not (run.path / file).is_file()]
        if lacking and (len(lacking) == len(kept) and name != HELD_OUT):
            continue
        if lacking and name != HELD_OUT:
            notes.append(f"{name}: left out, not measured in {', '.join(map(short, lacking))}")
            continue
        table = _read(kept, file, notes, name)
        if table is not None:
            probes.append(_probe(name, table, arms, resampling))
    for source in _sources(kept, notes):
        name = f"{HELD_OUT}: {source}"
        table = _read(kept, PROBES[HELD_OUT], notes, name, source=source)
        if table is not None:
            probes.append(_probe(name, table, arms, resampling))
    notes += [f"{arm.name}: one run; its interval says nothing of other seeds" for arm in arms if len(arm.runs) == 1]
    return Contrast(tuple(arms), tuple(probes), tuple(notes), resampling)


def _sources(runs: Sequence[RunDir], notes: list[str]) -> list[str]:
    """The sources that all runs measured by themselves; of mixes, each is compared like a probe."""
    each = [
        dict.fromkeys(line["source"] for line in read_lines(run, PROBES[HELD_OUT]) if "source" in line) for run in runs
    ]
    common = [name for name in each[0] if all(name in names for names in each)]
    if any(len(names) > len(common) for names in each):
        notes.append("only sources of one name in all runs are compared by themselves")
    return common


def _read(
    runs: Sequence[RunDir], file: str, notes: list[str], probe: str, *, source: str | None = None
) -> _Table | None:
    """The lines of all runs by row, of rows that all of them have; None where they have none in common.

    With `source`, its lines as the task that they are; without, those of a mix by the likelihood of their answers.
    """
    measured = [_by_row(run, file, source=source) for run in runs]
    kinds = {kind for kind, _ in measured}
    if len(kinds) > 1:
        raise RunError(
            expected="runs of one kind of task", found=" and ".join(sorted(kinds)), fix="compare those of a kind"
        )
    rows = sorted(set.intersection(*(set(lines) for _, lines in measured)))
    most = max(len(lines) for _, lines in measured)
    if len(rows) < most:
        notes.append(f"{probe}: only the {len(rows)} rows that all runs have, of up to {most}")
    if not rows:
        return None
    asked = [_asked(run.recipe(), probe) for run in runs]
    if any(one != asked[0] for one in asked):
        notes.append(f"{probe}: the runs were not all given the same ones")
    sums = np.array([[lines[row] for _, lines in measured] for row in rows])  # rows, runs, (score, lines, tokens)
    scores, lines, tokens = sums[..., 0], sums[..., 1], sums[..., 2]
    if ACCURACY in kinds:
        return _Table(ACCURACY, scores, lines)
    # bases that cut text into other tokens have no loss per token in common
    same = bool(np.isfinite(tokens).all()) and bool((tokens / lines == (tokens / lines)[:, :1]).all())
    return _Table(PER_TOKEN, scores, tokens) if same else _Table(PER_ANSWER, scores, lines)


def _by_row(run: RunDir, file: str, *, source: str | None) -> tuple[str, dict[int, Floats]]:
    """The kind of score, and for each row the sums of score, lines and tokens (nan where not recorded)."""
    rows: dict[int, Floats] = {}
    kind = ACCURACY
    for line in read_lines(run, file):
        if source is not None and line.get("source") != source:
            continue
        adapter = line["adapter"] if source is not None else line.get("likelihood", line)["adapter"]
        if "log_probability" in adapter:
            kind = "loss"
            tokens = adapter.get("tokens", line.get("tokens", np.nan))
            sums = np.array([-adapter["log_probability"], 1.0, tokens])
        else:
            chosen = max(adapter, key=adapter.__getitem__)
            sums = np.array([float(chosen == line["answer"]), 1.0, np.nan])
        rows[line["row"]] = rows[line["row"]] + sums if line["row"] in rows else sums
    return kind, rows


def _asked(recipe: Recipe, probe: str) -> Any:
    """The settings that decide what a probe asks."""
    if probe == "perturbed text":
        return recipe.evaluation.perturbation
    if probe == "unseen phrasings":
        trained = recipe.data.instructions
        return recipe.evaluation.unseen_instructions, trained if trained is not None and trained.hold_out else None
    return None


def _probe(name: str, table: _Table, arms: Sequence[Arm], resampling: Resampling) -> Probe:
    ends = np.cumsum([len(arm.runs) for arm in arms])
    members = [range(end - len(arm.runs), end) for arm, end in zip(arms, ends, strict=True)]
    by_run = table.by_run
    drawn = resample(table.totals, table.counts, members, samples=resampling.samples, seed=resampling.seed)
    means = [float(by_run[list(runs)].mean()) for runs in members]
    scores = tuple(
        ArmScore(
            arm.name,
            percentile(means[at], drawn[:, at], confidence=resampling.confidence),
            tuple(float(by_run[run]) for run in members[at]),
        )
        for at, arm in enumerate(arms)
    )
    pairs = list(combinations(range(len(arms)), 2))
    # rounded, as equal sums of log probabilities may differ in their last bit
    changes = [(drawn[:, second] - drawn[:, first]).round(12) for first, second in pairs]
    raw = [two_sided_p(change) for change in changes]
    differences = tuple(
        Difference(
            arms[first].name,
            arms[second].name,
            percentile(means[second] - means[first], change, confidence=resampling.confidence),
            p,
            adjusted,
        )
        for (first, second), change, p, adjusted in zip(pairs, changes, raw, holm(raw), strict=True)
    )
    return Probe(name, table.metric, len(table.totals), scores, differences)


def resample(totals: Floats, counts: Floats, members: Sequence[Sequence[int]], *, samples: int, seed: int) -> Floats:
    """Bootstrap means of the arms, shape (samples, arms), from sums of shape (rows, runs) and the `members` of each.

    Rows are drawn once for all runs, which keeps the arms paired, and runs within each arm by themselves: the
    pigeonhole bootstrap of rows crossed with runs, a little wide by design (Owen 2007, doi:10.1214/07-AOAS122). Of n
    runs n - 1 are drawn, which makes the variance of their mean unbiased (Rao and Wu 1988,
    doi:10.1080/01621459.1988.10478591); with n draws, that of two runs would come out at half.
    """
    rng = np.random.default_rng(seed)
    rows, runs = totals.shape
    means = np.empty((samples, runs))
    step = max(1, DRAWN_AT_ONCE // rows)
    for start in range(0, samples, step):
        size = min(step, samples - start)
        cells = rng.integers(rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        weights = np.bincount(cells.ravel(), minlength=size * rows).reshape(size, rows).astype(np.float64)
        means[start : start + size] = (weights @ totals) / (weights @ counts)
    drawn = np.empty((samples, len(members)))
    for arm, columns in enumerate(members):
        own, number = means[:, list(columns)], len(columns)
        if number > 1:
            own = np.take_along_axis(own, rng.integers(number, size=(samples, number - 1)), axis=1)
        drawn[:, arm] = own.mean(axis=1)
    return drawn


def two_sided_p(changes: Floats) -> float:
    """Achieved significance of a difference being zero: the level at which its percentile interval ends at zero.

    Chosen over permuting rows because only the bootstrap counts the chance of training as well (Efron and Tibshirani
    1993, An Introduction to the Bootstrap, section 15.4). One is added to both counts, so that a finite number of
    resamples never gives zero (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).
    """
    rarer = min(np.count_nonzero(changes <= 0), np.count_nonzero(changes >= 0))
    return float(min(1.0, 2 * (rarer + 1) / (len(changes) + 1)))


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979, Scandinavian Journal of Statistics 6:65-70)."""
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted
