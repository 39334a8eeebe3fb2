"""The certificate of a merge: what was merged into what, how each candidate compares with the run, what was written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ift_peft.adapter_methods import NAMES as METHODS
from ift_peft.adapter_methods import Method, article
from ift_peft.adapters.checkpoint import sha256
from ift_peft.adapters.fidelity import Answered, Divergence
from ift_peft.adapters.plan import ADAPTER_FILE
from ift_peft.durable import write_atomically
from ift_peft.environment import git_state, versions
from ift_peft.evaluate.intervals import Estimate
from ift_peft.infer.load import Parts

Onto = Literal["unquantized", "dequantized"]
Prefer = Literal["fidelity", "quality"]
NAMES = {"unquantized": "unquantised", "dequantized": "dequantised"}  # as they are written in prose


@dataclass(frozen=True)
class Candidate:
    """A merged model in `folder`, measured after reloading it from there.

    `from_run` is its divergence from the run's adapter over the base it was trained over. `max_logit_difference` is
    from what it must equal, within `bound`: the adapter over the weights it was merged into or, of a requantised model,
    that model before it was written. `same_labels` are those as in the run.
    """

    onto: Onto
    quantization: Literal["none", "nf4"]
    dtype: str
    folder: Path
    answered: Answered
    from_run: Divergence
    max_logit_difference: float
    bound: float
    same_labels: int | None
    metric: Estimate
    change: Estimate

    def describe(self, metric: str) -> dict[str, Any]:
        """As it stands in certificate.json."""
        return {
            "onto": self.onto,
            "quantization": self.quantization,
            "dtype": self.dtype,
            "kl_mean": self.from_run.kl_mean,
            "kl_max": self.from_run.kl_max,
            metric: self.metric.to_json(),
            "change": self.change.to_json(),
            "same_labels": self.same_labels,
            "max_logit_difference": self.max_logit_difference,
            "bound": self.bound,
        }


def choose(candidates: list[Candidate], *, prefer: Prefer, metric: str) -> Candidate:
    """The candidate nearest to the run by mean KL, or the one with the best metric, and of equal ones the nearest."""
    if prefer == "fidelity":
        return min(candidates, key=lambda one: one.from_run.kl_mean)
    sign = -1 if metric == "accuracy" else 1
    return min(candidates, key=lambda one: (sign * one.metric.value, one.from_run.kl_mean))


def write_certificate(
    parts: Parts,
    written: Candidate,
    candidates: list[Candidate],
    *,
    run_metric: Estimate,
    metric: str,
    prefer: Prefer,
    how: dict[str, Any],
) -> None:
    """Write certificate.json, and a section of the model card, into the folder of the candidate to be `written`.

    `how` tells how its weights came about. No path of the machine goes into either file.
    """
    folder = written.folder
    manifest = parts.run.read("manifest.json")
    content = {
        "run": {"name": parts.recipe.name, "id": parts.run.path.name},
        "base": {
            "name": parts.location.public_name,
            "revision": parts.location.revision,
            "fingerprint": manifest["inputs"]["base_fingerprint"],
            "quantization": parts.recipe.base.quantization,
        },
        "adapter": {"sha256": sha256(parts.run.adapter / ADAPTER_FILE)},
        "written": {
            "onto": written.onto,
            "quantization": written.quantization,
            "dtype": written.dtype,
            "prefer": prefer,
            **how,
            "files": {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))},
        },
        "measured_on": {"rows": len(written.answered.tokens), "supervised_tokens": written.from_run.tokens},
        "run_as_trained": {metric: run_metric.to_json()},
        "candidates": [one.describe(metric) for one in candidates],
        "versions": versions(),
        "git": git_state(),
    }
    write_atomically(folder / "certificate.json", json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    _describe(parts, written, metric)


def weights_of(onto: Onto, quantization: str) -> str:
    """The weights that were merged into, in words."""
    return "the unquantised base" if onto == "unquantized" else f"the base's {quantization} weights, dequantised,"


def as_merge(card: str, method: Method) -> str:
    """The text of an adapter's card, calling it the merge of that adapter."""
    adapter = f"{article(method)} {METHODS[method]} adapter"
    return card.replace(f"\n{adapter} for", f"\nA merge of a{adapter[1:]} into", 1)


def _describe(parts: Parts, written: Candidate, metric: str) -> None:
    card = (parts.run.adapter / "README.md").read_text("utf-8").split("\n## Use", 1)[0]
    card = as_merge(card.replace("library_name: peft", "library_name: transformers"), parts.recipe.adapter.method)
    packed = " and quantised to nf4 again" if written.quantization == "nf4" else ""
    value = f"{metric} {written.metric.value:.3f} ({written.metric.low:.3f} to {written.metric.high:.3f})"
    write_atomically(
        written.folder / "README.md",
        f"{card}\n## Merge\n\nMerged into {weights_of(written.onto, parts.recipe.base.quantization)} as {written.dtype}"
        f"{packed}. On {len(written.answered.tokens)} held-out rows, reloaded from disk, its logits differ from what "
        f"was merged by at most {written.max_logit_difference:.2e}; from the adapter as trained it diverges by "
        f"{written.from_run.kl_mean:.2e} nats per supervised token; {value}. All of it is in certificate.json.\n",
    )
