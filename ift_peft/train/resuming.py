"""Going on with a run: which checkpoint is taken, what was passed over, and what is no longer as it was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ift_peft.environment import made_on
from ift_peft.errors import RunError, first_line
from ift_peft.run_dir import METRICS, RunDir
from ift_peft.train.checkpoints import MANIFEST, PROGRESS, differences, newest_verified, set_aside_after, step_of, tidy
from ift_peft.train.progress import Progress


@dataclass(frozen=True)
class TakenUp:
    """`checkpoint` is None where none verifies: training begins again. `passed_over` and `differs` are for people."""

    checkpoint: Path | None
    passed_over: list[str]
    differs: list[str]

    @property
    def step(self) -> int:
        return 0 if self.checkpoint is None else step_of(self.checkpoint)

    @property
    def notes(self) -> list[str]:
        """What there is to be said beside where it goes on."""
        notes = [f"warning: {line}" for line in self.passed_over]
        if self.checkpoint is not None and self.differs:
            notes.append(
                f"warning: not as when {self.checkpoint.name} was written, so that the rest may differ in its last "
                f"bits: {'; '.join(self.differs)}"
            )
        return notes

    def to_json(self) -> dict[str, Any]:
        name = None if self.checkpoint is None else self.checkpoint.name
        return {"from": name, "passed_over": self.passed_over, "differs": self.differs}


def take_up(run: RunDir, *, device: torch.device) -> TakenUp:
    """Find the checkpoint that `run` goes on from, and take out of the run what lies beyond it; for who holds the run.

    What a killed process left half-written is removed, later checkpoints, which do not verify, are renamed to
    `broken-…`, and lines of steps that will be taken again go out of metrics.jsonl, with all from the first on that is
    none.
    """
    run.remove_temporaries()
    tidy(run.checkpoints)
    checkpoint, passed_over = newest_verified(run.checkpoints)
    differs = [] if checkpoint is None else differences(checkpoint, made_on=made_on(device))
    lines, lost = run.read_metrics()
    if lost:
        passed_over.append(f"{lost} of {len(lines) + lost} lines of {METRICS} are dropped: the first is none of a log")
    found = TakenUp(checkpoint, passed_over, differs)
    set_aside_after(run.checkpoints, found.step)
    if (run.path / METRICS).is_file():
        run.write_lines(METRICS, [line for line in lines if line["step"] <= found.step])
    return found


def read_progress(checkpoint: Path) -> Progress:
    """What `checkpoint`, which verified, holds of it. Raises `RunError` where another version wrote it otherwise."""
    try:
        return Progress.from_json(json.loads((checkpoint / PROGRESS).read_text("utf-8")))
    except (TypeError, ValueError) as error:
        raise RunError(
            expected=f"{PROGRESS} in {checkpoint} as this version writes it",
            found=first_line(error),
            fix=f"go on with the versions in its {MANIFEST}, or train again",
        ) from None


def changed_settings(began: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """Which settings are no longer those that a run `began` with; none where it did not record them.

    A setting that there was not yet is none that was changed; of `training`, which may hold any name, it is one.
    """
    before, after = (_flat(one) for one in (began or now, now))
    return [
        f"{name} was {before.get(name, 'not set')}, is {after.get(name, 'not set')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and (name in before or name.startswith("training."))
    ]


def _flat(sections: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value for section, entries in sections.items() for name, value in (entries or {}).items()
    }
