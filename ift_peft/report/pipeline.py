"""What the report of a pipeline says, as plain values read from its run folder."""

from __future__ import annotations

from typing import Any

from ift_peft.report.examples import cut
from ift_peft.report.provenance import Public, recipe_text
from ift_peft.report.scores import comparisons
from ift_peft.run_dir import RunDir
from ift_peft.stages import AT_ONCE

SHOWN = 5  # requests whose every intermediate answer is shown


def pipeline_view(run: RunDir) -> dict[str, Any]:
    """Everything the template shows. Raises `RunError` for a run whose files are broken."""
    manifest, recipe = run.read("manifest.json"), run.recipe()
    scores = run.read("scores.json") if (run.path / "scores.json").is_file() else None
    lines = run.read_lines("predictions.jsonl") if (run.path / "predictions.jsonl").is_file() else []
    folder = "/".join(run.path.resolve().parts[-3:])
    return {
        "name": recipe.name,
        "description": cut(recipe.description),
        "status": manifest.get("status", "unknown"),
        "error": Public.of(recipe, run).text(str(manifest.get("error") or "")),
        "started": str(manifest.get("started", ""))[:16].replace("T", " "),
        "rows": None if scores is None else scores["rows"],
        "intervals": "" if scores is None else scores["intervals"],
        "verdict": None if scores is None else scores["document"].get("verdict"),
        "document": () if scores is None else _document(scores["document"]),
        "against": scores is not None and AT_ONCE in scores["document"],
        "stages": [] if scores is None else [_stage(name, own) for name, own in scores["stages"].items()],
        "examples": [_example(line) for line in lines[:SHOWN]],
        "runs": [(name, "/".join(part.path.resolve().parts[-2:])) for name, part in run.parts.items()],
        "versions": manifest.get("versions", {}),
        "commands": [
            (f"ift train {folder}/recipe.yaml", "takes trained stages as they are, and measures"),
            (f"ift pipeline {folder} TEXT", "asks it"),
            (f"ift report {folder}", "writes this page again"),
        ],
        "recipe_text": recipe_text(recipe),
    }


def _document(found: dict[str, Any]) -> Any:
    return comparisons(
        {"base": found.get(AT_ONCE, {}), "adapter": found["pipeline"], "change": found.get("change", {})}
    )


def _stage(name: str, own: dict[str, Any]) -> dict[str, Any]:
    found = comparisons({"base": own["given"], "adapter": own["piped"], "change": own["change"]})
    return {"name": name, "scores": found, "empty": own["empty"], "truncated": own["truncated"]}


def _example(line: dict[str, Any]) -> dict[str, Any]:
    return {
        "request": [(name, cut(text)) for name, text in line["request"].items()],
        "stages": [(name, cut(line["wanted"][name]), cut(text)) for name, text in line["pipeline"].items()],
        "at_once": cut(line[AT_ONCE]) if AT_ONCE in line else None,
    }
