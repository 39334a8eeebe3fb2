"""How long a command imports, with and without looking for garbage meanwhile: python -m benchmarks.starting

Each time in a process of its own, the two kinds in turn, so that a machine that is busy for a while is so for both.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Annotated

import typer

from benchmarks.record import write_result

IMPORTS = "import ift_peft.train.run"
KINDS = {
    "as Python does": IMPORTS,
    "without looking for garbage": f"from ift_peft.loading import imports\nwith imports():\n    {IMPORTS}",
}
SECONDS = "import time; print(time.process_time())"


def measured(program: str) -> float:
    """Seconds of processor time of a process that runs `program`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{SECONDS}"], capture_output=True, text=True, check=True, timeout=300
    )
    return float(done.stdout)


def main(times: Annotated[int, typer.Option(min=2, help="How often each is measured.")] = 7) -> None:
    """Example: python -m benchmarks.starting --times 7"""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    measured(IMPORTS)  # files are read from the disk once
    for _ in range(times):
        for kind, program in KINDS.items():
            found[kind].append(measured(program))
    medians = {kind: statistics.median(seconds) for kind, seconds in found.items()}
    for kind, seconds in found.items():
        print(f"{kind:<28} {medians[kind]:6.2f} s   {min(seconds):.2f} to {max(seconds):.2f}")
    before, after = medians.values()
    print(f"saved {1 - after / before:.1%}")
    write_result("starting", {"times": times, "seconds": found, "medians": medians, "saved": 1 - after / before})


if __name__ == "__main__":
    typer.run(main)
