"""What the report of several adapters compared says, as plain values read from its run folder."""

from __future__ import annotations

from typing import Any

from ift_peft.report.examples import cut
from ift_peft.report.provenance import Public, recipe_text
from ift_peft.report.scores import as_value
from ift_peft.run_dir import RunDir


def merging_view(run: RunDir) -> dict[str, Any]:
    """Everything the template shows. Raises `RunError` for a run whose files are broken."""
    manifest, recipe = run.read("manifest.json"), run.recipe()
    scores = run.read("scores.json") if (run.path / "scores.json").is_file() else {"domains": {}, "mean": {}}
    folder = "/".join(run.path.resolve().parts[-3:])
    public = Public.of(recipe, run)
    return {
        "name": recipe.name,
        "description": cut(recipe.description),
        "status": manifest.get("status", "unknown"),
        "error": public.text(str(manifest.get("error") or "")),
        "started": str(manifest.get("started", ""))[:16].replace("T", " "),
        "domains": [(name, own["metric"], own["rows"], _arms(own["arms"])) for name, own in scores["domains"].items()],
        "means": [(arm, f"{mean:.3f}") for arm, mean in scores["mean"].items()],
        "intervals": scores.get("intervals", ""),
        "notes": [public.text(note) for note in scores.get("notes", ())],
        "runs": [(name, "/".join(part.path.resolve().parts[-2:])) for name, part in run.parts.items()],
        "versions": manifest.get("versions", {}),
        "commands": [
            (f"ift train {folder}/recipe.yaml", "takes what was trained and combined as it is, and measures"),
            (f"ift report {folder}", "writes this page again"),
        ],
        "recipe_text": recipe_text(recipe),
    }


def _arms(arms: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, as_value(one["score"]), as_value(one["change"])) for name, one in arms.items()]
