"""The clock over a chat template that is rendered."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

PROFILED = """
import cProfile
from ift_peft.data.template import TooSlow, within
with within(60):
    pass
try:
    with within(0.05):
        while True:
            pass
except TooSlow:
    print("stopped")
cProfile.run("print(sum(map(abs, range(-3, 3))))")
"""


def test_the_clock_leaves_the_interpreter_as_it_was() -> None:
    """CPython 3.11 goes round for ever under a profiler once an exception for a thread was taken back."""
    done = subprocess.run([sys.executable, "-c", PROFILED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[:2] == ["stopped", "9"], done.stderr
