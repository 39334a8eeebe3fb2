"""How a benchmark keeps its result: numbers beside the versions, commit and machine that made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ift_peft.environment import git_state, hardware, versions

RESULTS = Path(__file__).resolve().parent / "results"


def write_result(name: str, result: Any, *, folder: Path = RESULTS) -> Path:
    """Write benchmarks/results/<name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"result": result, "versions": versions(), "git": git_state(), "hardware": hardware()}
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
    return path
