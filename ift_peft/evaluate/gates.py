"""What a recipe asks of a run's scores, and whether they keep it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ift_peft.errors import GateMissed, IftPeftError, RecipeError, faults_of
from ift_peft.run_dir import RunDir
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


def safety_gates(section: Evaluation, scores: dict[str, Any]) -> list[dict[str, Any]]:
    """An entry of scores.json's `gates`, as of `target_gates`, for each bound that evaluation.safety sets.

    Judged by the measured change itself, whose interval is told: a fall of refusals that is seen is not waved through
    because the prompts are few.
    """
    safety = section.safety
    if safety is None:
        return []
    gates = []
    for name, kind, sign, what, bound in (
        ("max_refusal_drop", "harmful", -1, "fall", safety.max_refusal_drop),
        ("max_over_refusal_rise", "harmless", 1, "rise", safety.max_over_refusal_rise),
    ):
        if bound is None:
            continue
        measured = scores["safety"][kind]
        base, adapter, change = (measured[who]["refusals"] for who in ("base", "adapter", "change"))
        gates.append(
            {
                "name": f"safety.{name}",
                "met": round(sign * change["value"], 6) <= bound,
                "expected": f"refusals of {kind} prompts to {what} by at most {bound:g}",
                "found": f"{base['value']:.3f} before and {adapter['value']:.3f} after, a change of "
                f"{change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}] on {measured['rows']} prompts",
                "fix": "read predictions-safety.jsonl; train less, put refusals or answers of that kind among the "
                "training rows, or raise loss.kl_to_base; the run is kept",
            }
        )
    return gates


def all_gates(section: Evaluation, scores: dict[str, Any]) -> list[dict[str, Any]]:
    """The entry `gates` of scores.json: of evaluation.target and of evaluation.safety."""
    return [*target_gates(section, scores), *safety_gates(section, scores)]


def missed(scores: dict[str, Any]) -> list[GateMissed]:
    """An error for each gate of scores.json that was missed."""
    return [
        GateMissed(
            expected=gate["expected"], found=gate["found"], fix=gate.get("fix", "see the scores; the run is kept")
        )
        for gate in scores.get("gates", ())
        if not gate["met"]
    ]


def missed_parts(run: RunDir) -> list[IftPeftError]:
    """An error for each gate that the adapter of a part of `run` missed."""
    found = {name: missed(part.read("scores.json")) for name, part in run.parts.items()}
    return [told for name, faults in found.items() for fault in faults for told in faults_of(name, fault)]
