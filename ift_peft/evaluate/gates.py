"""What a recipe asks of a run's scores, and whether they keep it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ift_peft.errors import GateMissed, RecipeError
from ift_peft.sections import Evaluation

CLASSIFICATION = ("accuracy", "precision", "recall", "f1")
LOWER_IS_BETTER = ("loss", "perplexity")
ROUGE = ("rouge1", "rouge2", "rougeL")


def check_targets(section: Evaluation, labels: Sequence[str]) -> None:
    """Raises `RecipeError` for a target of a metric that the task does not have; called before anything is trained."""
    several = {"rouge": ROUGE, "pass_at_k": tuple(f"pass@{k}" for k in section.pass_at)}
    generated = [name for metric in section.metrics for name in several.get(metric, (metric,))]
    known = CLASSIFICATION if labels else (*LOWER_IS_BETTER, *generated)
    unknown = [name for name in section.target if name not in known]
    if unknown:
        raise RecipeError(
            expected=f"evaluation.target of metrics that are measured: {', '.join(known)}",
            found=", ".join(unknown),
            fix="name one of them; those of generated answers are chosen by evaluation.metrics",
        )


def reached(metric: str, estimate: dict[str, Any], target: float) -> bool:
    """Whether the worse end of the interval of `estimate` (value, low, high) is at least as good as `target`."""
    return bool(estimate["high"] <= target) if metric in LOWER_IS_BETTER else bool(estimate["low"] >= target)


def target_gates(section: Evaluation, scores: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry of scores.json's `gates` for each target: its `name`, whether it is `met`, `expected` and `found`."""
    gates = []
    for metric, target in section.target.items():
        part = scores["adapter"][metric]
        sign = "at most" if metric in LOWER_IS_BETTER else "at least"
        gates.append(
            {
                "name": metric,
                "met": reached(metric, part, target),
                "expected": f"{metric} {sign} {target:g} at the worse end of its interval",
                "found": f"{part['value']:.3f} [{part['low']:.3f}, {part['high']:.3f}]",
            }
        )
    return gates


def missed(scores: dict[str, Any]) -> list[GateMissed]:
    """An error for each gate of scores.json that was missed."""
    return [
        GateMissed(
            expected=gate["expected"], found=gate["found"], fix=gate.get("fix", "see the scores; the run is kept")
        )
        for gate in scores.get("gates", ())
        if not gate["met"]
    ]
