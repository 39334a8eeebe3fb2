"""What comes with a base or an adapter, tried in a process of its own whose time and memory are bounded.

Chat templates and patterns of modules are programs: how long they run, nobody can tell by looking. The process is
`trial_process.py`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

from ift_peft import trial_process
from ift_peft.errors import ModelError
from ift_peft.trial_process import DONE, MEMORY, SECONDS, TOO_MUCH

__all__ = ["MEMORY", "SECONDS", "TakesMore", "tried"]

PATIENCE = 600.0  # seconds, of a machine that is busy with other things


class TakesMore(Exception):
    """It was stopped at a bound."""


def tried(module: str, given: Any) -> str | None:
    """What `module.trial(given)` returns: why the thing must not be used, or None.

    Raises `TakesMore`, and `ModelError` where it could not be tried: what was not tried is not used.
    """
    asked = {"path": sys.path, "module": module, "given": given}
    try:
        process = subprocess.run(  # -I: nothing out of the environment; a session: Ctrl-C is for the parent to tell
            [sys.executable, "-I", str(trial_process.__file__)],
            input=json.dumps(asked).encode(),
            capture_output=True,
            timeout=PATIENCE,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise TakesMore from None
    except OSError as error:
        raise _untried(str(error)) from None
    if process.returncode in (TOO_MUCH, -signal.SIGXCPU, -signal.SIGKILL):
        raise TakesMore
    if process.returncode != DONE:
        lines = process.stderr.decode("utf-8", "replace").strip().splitlines()
        raise _untried(f"exit code {process.returncode}{f': {lines[-1]:.300}' if lines else ''}")
    answer: str | None = json.loads(process.stdout)
    return answer


def _untried(found: str) -> ModelError:
    return ModelError(
        expected="a process in which what comes with a base or an adapter is tried",
        found=found,
        fix="see that this Python can start itself, and that there is memory for it",
    )
