"""A run without the rows it was made of: it answers as before, and says nothing of what it was shown.

What stays is what `KEPT` names: recipe, manifest, measured numbers, adapter and checkpoints. Weights are not undone by
it. The golden example, which each opening of a run is checked with, becomes one of a fixed text, and the report is
written again of what is left.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from ift_peft.data.row import Message
from ift_peft.errors import IftPeftError
from ift_peft.report.write import NAME as REPORT
from ift_peft.report.write import write_report
from ift_peft.run_dir import RunDir

log = logging.getLogger("ift_peft.serve")

KEPT = ("recipe.yaml", "manifest.json", "metrics.jsonl", "scores.json", "adapter", "checkpoints", ".lock")
GOLDEN = "golden.json"
PUBLIC: tuple[Message, ...] = (
    {"role": "user", "content": "What is two plus two? 二加二等于几？"},
    {"role": "assistant", "content": "Four. 四。"},
)


def forget_rows(path: Path) -> None:
    """Remove from the run at `path` all that quotes rows. Cut short, it is done when called again; then nothing.

    The report goes first and comes last: where there is one beside the fixed example, all is done.
    """
    run = RunDir(path)
    if _is_forgotten(run):
        return
    (path / REPORT).unlink(missing_ok=True)
    golden = _public_golden(run)
    if golden is not None:
        run.write(GOLDEN, golden)
    for found in path.iterdir():
        if found.name in KEPT or (found.name == GOLDEN and golden is not None):
            continue
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found)
        else:
            found.unlink()
    try:
        write_report(run)
    except (IftPeftError, OSError) as error:  # a run that never got far enough to have one
        log.warning("no report of a run without its rows", extra={"run": path.name, "fault": type(error).__name__})


def _is_forgotten(run: RunDir) -> bool:
    found = {path.name for path in run.path.iterdir()} - set(KEPT)
    return found == {GOLDEN, REPORT} and run.read(GOLDEN).get("messages") == list(PUBLIC)


def _public_golden(run: RunDir) -> dict[str, Any] | None:
    """The golden example of the fixed text; None where the run has none, or its base is no longer there to render it.

    The base is the one of training, or it is refused: an example that another one rendered would let that pass.
    """
    if not (run.path / GOLDEN).is_file():
        return None
    then = run.read(GOLDEN)
    if then.get("messages") == list(PUBLIC):
        return then
    from ift_peft.infer.load import open_parts

    try:
        renderer = open_parts(run).renderer
        (rendered,) = renderer.render([PUBLIC])
    except (IftPeftError, OSError, KeyError) as error:
        log.warning(
            "a run cannot be opened any more: its rows are deleted, and no other example could be rendered",
            extra={"run": run.path.name, "fault": type(error).__name__},
        )
        return None
    template: dict[str, Any] = {name: then[name] for name in ("template_sha256", "template") if name in then}
    return {"messages": list(PUBLIC), "input_ids": rendered.input_ids, "labels": rendered.labels, **template}
