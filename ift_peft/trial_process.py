"""The process of `trial`, run as a script: told on standard input what to call, it answers on standard output.

It imports nothing of ours before it has its parent's path: -I leaves PYTHONPATH out, and another version may lie about.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys

DONE, TOO_MUCH = 70, 71  # not 0 or 1, with which a process ends that has tried nothing
SECONDS = 5  # of a processor
MEMORY = 1 << 30  # bytes; where the system bounds memory


def _bound(kind: int, most: int) -> None:
    """Bound this process, by less where it may not have so much; macOS bounds no memory."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    try:
        resource.setrlimit(kind, (most, most))
    except (ValueError, OSError):
        if kind == resource.RLIMIT_CPU:
            raise


def _main() -> None:
    asked = json.load(sys.stdin)
    sys.path[:] = asked["path"]
    trial = importlib.import_module(asked["module"]).trial
    _bound(resource.RLIMIT_AS, MEMORY)
    _bound(resource.RLIMIT_CPU, SECONDS)
    try:
        answer = trial(asked["given"])
    except (MemoryError, RecursionError):
        sys.exit(TOO_MUCH)
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    sys.exit(DONE)


if __name__ == "__main__":
    _main()
