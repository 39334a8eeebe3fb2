"""What a report says, as plain values read from a run folder; what a run does not have is None or empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ift_peft.errors import RunError
from ift_peft.recipe import Recipe
from ift_peft.report.examples import Text, cut, examples
from ift_peft.report.figures import line_charts, reliability, strips
from ift_peft.report.mask import mask
from ift_peft.report.provenance import Public, commands, place_free, recipe_text, seeds
from ift_peft.report.scores import Block, Comparison, blocks, comparisons, verdict
from ift_peft.run_dir import RunDir

MOST_LABELS = 24  # more classes than this are shown by their commonest confusions
OWN_SECTIONS = {  # entries of scores.json with a section of their own, and its heading
    "unseen": "Unseen phrasings",
    "perturbed": "Perturbed text",
    "forgetting": "Forgetting",
    "by_source": "By source",
    "safety": "Safety",
}
TOLD = {
    "unseen": "The same held-out rows, asked in words that training never used.",
    "perturbed": "The same held-out rows with synonyms and slips of the keyboard in their texts.",
    "forgetting": "Loss in nats per token on general text that has nothing to do with the task.",
}
MEMORY = {  # entries of the manifest's memory
    "foreseen_bytes": "memory foreseen for training",
    "free_before_bytes": "memory free before",
    "rss_before_training_bytes": "process before training",
    "peak_rss_in_training_bytes": "process at most in training",
    "peak_rss_bytes": "process at most in the run",
    "cuda_before_training_bytes": "GPU before training",
    "peak_cuda_in_training_bytes": "GPU at most in training",
}
DRAWN_ELSEWHERE = ("rows", "intervals", "base", "adapter", "change", "confusion", "per_class", "calibration", "gates")

Facts = list[tuple[str, str]]


def view(run: RunDir) -> dict[str, Any]:
    """Everything the template shows. Raises `RunError` for a run whose files are broken."""
    manifest, recipe = run.read("manifest.json"), run.recipe()
    scores = run.read("scores.json") if (run.path / "scores.json").is_file() else None
    public = Public.of(recipe, run)
    findings = run.read("findings.json")["findings"] if (run.path / "findings.json").is_file() else None
    golden = run.read("golden.json") if (run.path / "golden.json").is_file() else None
    return {
        "name": recipe.name,
        "description": cut(recipe.description),
        "status": manifest.get("status", "unknown"),
        "error": public.text(str(manifest.get("error") or "")),
        "started": str(manifest.get("started", ""))[:16].replace("T", " "),
        **_measured(recipe, scores or {}),
        "examples": examples(_lines(run, "test.jsonl"), _lines(run, "predictions.jsonl")),
        "trained": _trained(recipe, manifest),
        "notes": [public.text(note) for note in manifest.get("notes", ())],
        "charts": line_charts(_lines(run, "metrics.jsonl")),
        "cost": _cost(manifest),
        "findings": None if findings is None else [_finding(one, public) for one in findings if one["count"]],
        "dropped": Counter(kind.replace("_", " ") for row in _lines(run, "dropped.jsonl") for kind in row["kinds"]),
        "mask": None if golden is None else mask(golden, run.adapter),
        "versions": manifest.get("versions", {}),
        "origin": _origin(manifest, public),
        "hashes": manifest.get("inputs") or {},
        "seeds": seeds(recipe),
        "commands": commands(run, manifest),
        "recipe_text": recipe_text(recipe),
    }


def _lines(run: RunDir, name: str) -> list[dict[str, Any]]:
    """The objects of a file of the run, none where it is missing. Raises `RunError` where it is broken."""
    path = run.path / name
    if not path.is_file():
        return []
    try:
        return run.read_lines(name)
    except ValueError as error:
        raise RunError(expected=f"one JSON object a line in {path}", found=str(error), fix="train again") from None


def _measured(recipe: Recipe, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Verdict, gates, and all that scores.json holds."""
    found = comparisons(scores) if scores else ()
    calibration = scores.get("calibration")
    sections = []
    for key, heading in OWN_SECTIONS.items():
        if scores.get(key):
            sections.append(_section(key, heading, TOLD.get(key, ""), scores[key]))
    rest = {key: value for key, value in scores.items() if key not in (*DRAWN_ELSEWHERE, *OWN_SECTIONS)}
    return {
        "verdict": verdict(recipe, scores) if scores else None,
        "gates": scores.get("gates", []),
        "rows": scores.get("rows"),
        "intervals": scores.get("intervals", ""),
        "scores": found,
        "strips": strips(found),
        "further": blocks(rest),
        "confusion": _confusion(scores["confusion"]) if "confusion" in scores else None,
        "per_class": _per_class(scores["per_class"]) if "per_class" in scores else None,
        "calibration": None if calibration is None else comparisons(calibration),
        "reliability": None if calibration is None else reliability(calibration.get("bins", {})),
        "sections": sections,
    }


def _section(key: str, heading: str, told: str, content: Any) -> dict[str, Any]:
    found: list[Block] = blocks(content) if isinstance(content, Mapping) else blocks({key: content})
    return {
        "key": key.replace("_", "-"),
        "heading": heading,
        "told": told,
        "blocks": [(block, strips(block.comparisons)) for block in found],
    }


def _confusion(confusion: Mapping[str, Any]) -> dict[str, Any]:
    """Matrices with each cell's share of its true class, or the commonest confusions of many classes."""
    labels = [Text(str(label)) for label in confusion["labels"]]
    matrices = []
    for who in ("base", "adapter"):
        counts = confusion[who]
        rows = [
            (label, [(count, count / (sum(row) or 1), at == own) for at, count in enumerate(row)])
            for own, (label, row) in enumerate(zip(labels, counts, strict=True))
        ]
        wrong = [
            (count, labels[own], labels[at])
            for own, row in enumerate(counts)
            for at, count in enumerate(row)
            if at != own and count
        ]
        wrong.sort(key=lambda one: -one[0])
        matrices.append({"who": who, "rows": rows, "wrong": wrong[:20]})
    return {"labels": labels, "matrices": matrices, "whole": len(labels) <= MOST_LABELS}


def _per_class(content: Mapping[str, Any]) -> list[tuple[Text, int, list[Comparison]]]:
    """Label, support and metrics of each class."""
    names = [name for name in next(iter(content["adapter"].values()), {}) if name != "support"]
    return [
        (
            Text(str(label)),
            int(part["support"]),
            list(
                comparisons(
                    {
                        "base": {name: content["base"][label][name] for name in names},
                        "adapter": {name: part[name] for name in names},
                    }
                )
            ),
        )
        for label, part in content["adapter"].items()
    ]


def _trained(recipe: Recipe, manifest: Mapping[str, Any]) -> Facts:
    base, adapter = manifest.get("base") or {}, recipe.adapter
    name = str(base.get("name") or place_free(recipe.base.model))
    settings, quantization = recipe.adapter.model_dump(mode="json"), recipe.base.quantization
    facts = [
        ("base", f"{name} at revision {base['revision']}" if base.get("revision") else name),
        ("weights", "unquantised" if quantization == "none" else f"quantised to {quantization}"),
        (
            f"adapter ({adapter.method})",
            ", ".join(f"{key} {_said(value)}" for key, value in settings.items() if key != "method"),
        ),
        ("loss", recipe.loss.kind.replace("_", " ")),
        *((str(key), _said(place_free(value))) for key, value in recipe.training.items()),
    ]
    for number, one in enumerate(manifest.get("combined_from") or ()):
        weight = manifest["combined"]["weights"][number]
        facts.append(("combined of", f"{weight:g} x {one['run']} (adapter {one['adapter_sha256'][:12]})"))
    if manifest.get("combined"):
        left_out = 100 * manifest["combined"]["left_out_by_rank"]
        facts.append(("combined by", f"{manifest['combined']['method']}; its rank leaves out {left_out:.1f} %"))
    parameters, rows = manifest.get("parameters"), manifest.get("rows") or {}
    if parameters:
        share = 100 * parameters["trained"] / parameters["all"]
        facts.insert(3, ("trained parameters", f"{parameters['trained']:,} of {parameters['all']:,} ({share:.2f} %)"))
    for who, heading in (("train", "rows trained on"), ("test", "rows held out")):
        if who in rows:
            facts.append((heading, _rows(rows[who])))
    return facts


def _rows(counts: Mapping[str, Any]) -> str:
    told = f"{counts['rows']:,} with {counts['tokens']:,} tokens, {counts['supervised_tokens']:,} of them supervised"
    if counts.get("variants", 1) > 1:
        told += f"; {counts['variants']} phrasings of each"
    for what in ("truncated", "dropped"):
        if counts.get(what):
            told += f"; {counts[what]:,} {what}"
    return told


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cost(manifest: Mapping[str, Any]) -> Facts:
    facts = []
    seconds = manifest.get("seconds")
    if seconds is not None:
        minutes = f" ({seconds / 60:.1f} minutes)" if seconds >= 120 else ""
        facts.append(("whole run", f"{seconds:,.0f} seconds{minutes}, measuring included"))
    if "steps" in manifest:
        facts.append(("steps", f"{manifest['steps']:,}"))
    if "tokens_per_second" in manifest:
        facts.append(("training speed", f"{manifest['tokens_per_second']:,.0f} tokens per second"))
    tokens = manifest.get("rows", {}).get("train", {}).get("tokens")
    if tokens is not None:
        facts.append(("tokens of the training rows", f"{tokens:,}"))
    if "padding_share" in manifest:
        facts.append(("padding", f"{100 * manifest['padding_share']:.1f} % of what the model computed on"))
    for key, value in (manifest.get("memory") or {}).items():
        if key in MEMORY:
            facts.append((MEMORY[key], f"{value / 1e9:.2f} GB"))
    return facts


def _finding(found: Mapping[str, Any], public: Public) -> dict[str, Any]:
    examples_of = [
        {**one, "where": public.text(one["where"]), "why": public.text(one["why"]), "excerpt": Text(one["excerpt"])}
        for one in found["examples"]
    ]
    return {**found, "kind": found["kind"].replace("_", " "), "examples": examples_of}


def _origin(manifest: Mapping[str, Any], public: Public) -> Facts:
    git, hardware = manifest.get("git"), manifest.get("hardware") or {}
    facts = []
    if git:
        facts.append(("git commit", git["commit"] + (" with uncommitted changes" if git.get("dirty") else "")))
    facts += [(f"hardware: {key.replace('_', ' ')}", str(value)) for key, value in hardware.items()]
    facts += [
        (name, public.text(str(manifest[key])))
        for key, name in (("template", "chat template"), ("max_length", "longest row in tokens"))
        if manifest.get(key) is not None
    ]
    facts += [(name, str(manifest[name])) for name in ("started", "finished") if name in manifest]
    return facts
