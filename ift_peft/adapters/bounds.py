"""What a merged model must keep to after reloading: its logits, its labels, the task's metric."""

from __future__ import annotations

from ift_peft.adapters.certificate import Candidate
from ift_peft.adapters.fidelity import Answered, agreement
from ift_peft.errors import MergeError
from ift_peft.evaluate.intervals import Estimate

BOUND = {"float32": 1e-3, "bfloat16": 1.0, "float16": 0.1}  # largest logit difference allowed after rounding to a type
WORSE_LOSS = 0.01  # nats per supervised token by which a merged model may certainly be worse than the run


def check_bound(difference: float, bound: float, what: str, rows: int) -> None:
    """Raises `MergeError` where logits of `what`, on that many `rows`, moved by more than `bound`, or to no number."""
    if not difference <= bound:
        raise MergeError(
            expected=f"logits of {what} within {bound:g} of what was merged, after reloading",
            found=f"a difference of {difference:.3g} on {rows} held-out rows",
            fix="merge with --dtype float32; nothing was written",
        )


def check_labels(reference: Answered, merged: Answered) -> None:
    """Raises `MergeError` where a label changed; tasks without labels pass."""
    same = agreement(reference, merged)
    if same is not None and same < len(merged.tokens):
        raise MergeError(
            expected="the same label on every held-out row",
            found=f"{len(merged.tokens) - same} changed",
            fix="nothing was written; is the base deterministic on this device?",
        )


def check_metric(written: Candidate, run: Estimate, metric: str) -> None:
    """Of a model quantised again the cost is measured and told; of any other, none is allowed.

    Raises `MergeError` where the one to be written is certainly worse at the task than the run.
    """
    worse = written.change.high < 0 if metric == "accuracy" else written.change.low > WORSE_LOSS
    if worse and written.quantization == "none":
        raise MergeError(
            expected=f"{metric} of the run, {run.value:.3f}, after merging",
            found=f"{written.metric.value:.3f}; the interval of the change is {written.change.low:.3f} to "
            f"{written.change.high:.3f}",
            fix="merge with --dtype float32 or --prefer fidelity; nothing was written",
        )
