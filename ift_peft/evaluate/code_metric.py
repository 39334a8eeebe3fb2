"""Programs that a model wrote, run against their tests: pass@k, and the sandbox that candidates run in.

Each candidate runs in a fresh isolated interpreter (`sandbox.py`) with an empty environment, no input, and an empty
working folder that is removed afterwards; with the standard library, and none of the installed packages.

Guarded against, on Linux on x86-64 and ARM64:

- time: after `timeout` seconds of wall-clock time the interpreter is killed; a limit of CPU time stands behind it;
- memory: `memory_mb` of address space, with no memory that this would not count;
- processes: none can be started and no program executed (seccomp), so that nothing stays behind and nothing multiplies;
  threads can, as many as the memory limit holds;
- network: no socket can be made, not even to this machine (seccomp), but pairs within the interpreter;
- signals to, limits of, and the memory of other processes, the one that started it included (seccomp, Landlock);
- files: none is made, changed or removed outside the working folder (Landlock, Linux 6.2 or newer), and no mode or
  owner is changed anywhere (seccomp); a file has at most `FILE_MB`, and at most `OPEN_FILES` are open at once;
- output: what is written beyond `OUTPUT_BYTES` is read and thrown away;
- privileges: as root, all capabilities are dropped;
- ending early, printing a word of success, another `AssertionError`, an unfinished string that swallows the tests: a
  candidate has passed only where the tests ran to their end, which is told by a random token on a pipe of its own.

Not guarded against:

- reading: every file that the user may read can be read, and what is read may stand in the output;
- access times and extended attributes of the user's own files;
- the disk: many files in the working folder fill it until the time is over;
- a program written against this very harness: the tests run in the interpreter of the candidate, which can search it
  for the token or return objects that equal everything. The tests of HumanEval (arXiv:2107.03374) have no more;
- errors in the kernel. To run programs of an enemy, put a virtual machine around it.

Where the kernel does not help (another system or machine, an older kernel, a container that forbids it), `missing` of
an `Outcome` names what is lost. Python's own functions for sockets, processes and signals are then taken away, which
stops accidents and no intent.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ift_peft.errors import RunError

Progress = Callable[[int, int], None]  # candidates run, candidates in all

SANDBOX = Path(__file__).with_name("sandbox.py")
OUTPUT_BYTES = 64 << 10
FILE_MB = 16
OPEN_FILES = 64
PROCESSES = 16  # where system calls are not filtered
START_SECONDS = 60.0  # for the interpreter to come up; a candidate's own time begins after that


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate: `reason` says what stopped it, `missing` which guards this system lacks."""

    passed: bool
    reason: str
    output: str
    missing: tuple[str, ...] = ()


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that at least one of `k` of the `samples` is correct: 1 - C(n-c, k) / C(n, k), without bias.

    As a product, which does not overflow (Chen et al. 2021, arXiv:2107.03374, section 2.1).
    """
    if samples - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


def code_of(text: str) -> str:
    """The program in an answer: its first fenced block, else all of it."""
    found = re.search(r"```[^\n`]*\n(.*?)(?:\n```|\Z)", text, re.DOTALL)
    return found.group(1) if found else text


def run_all(
    candidates: Sequence[Sequence[str]],
    tests: Sequence[str],
    *,
    timeout: float = 10.0,
    memory_mb: int = 512,
    workers: int = 1,
    progress: Progress | None = None,
) -> list[list[Outcome]]:
    """The outcome of each candidate for each problem, `workers` of them at a time."""
    jobs = [(code, test) for codes, test in zip(candidates, tests, strict=True) for code in codes]
    outcomes = []
    with ThreadPoolExecutor(workers) as pool:
        running = pool.map(lambda job: run_candidate(*job, timeout=timeout, memory_mb=memory_mb), jobs)
        for done, outcome in enumerate(running, start=1):
            outcomes.append(outcome)
            if progress is not None:
                progress(done, len(jobs))
    rest = iter(outcomes)
    return [[next(rest) for _ in codes] for codes in candidates]


def run_candidate(
    code: str, tests: str, *, timeout: float = 10.0, memory_mb: int = 512, kernel: bool = True
) -> Outcome:
    """Run `code` and then `tests` in one module of a fresh interpreter.

    `kernel=False` does without the guards of the kernel, as on a system that has none. Raises `RunError` on Windows.
    """
    if os.name != "posix":
        raise RunError(
            expected="Linux or macOS to run candidates in", found=sys.platform, fix="leave pass_at_k out of the metrics"
        )
    token = secrets.token_hex(32)
    limits = {"timeout": timeout, "memory_mb": memory_mb, "file_mb": FILE_MB, "files": OPEN_FILES}
    program = {**limits, "processes": PROCESSES, "kernel": kernel, "token": token, "code": code, "tests": tests}
    reading, writing = os.pipe()
    with (
        open(reading, "rb", buffering=0) as verdict,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryDirectory(prefix="candidate-", ignore_cleanup_errors=True) as folder,
    ):
        given.write(json.dumps(program).encode())
        given.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SANDBOX), str(writing)],
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={},
                pass_fds=(writing,),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        with process:
            try:
                output, told, in_time = _collect(process.stdout, verdict, timeout)
            finally:
                # Before it is waited for: until then its number cannot be another group's.
                os.killpg(process.pid, signal.SIGKILL)
    return _outcome(output, told, token, f"timed out after {timeout:g} s" if not in_time else process.returncode)


def _collect(stdout: IO[bytes] | None, verdict: Any, timeout: float) -> tuple[bytes, bytes, bool]:
    """What was written to both pipes, as much as is kept, and whether they were closed in time."""
    assert stdout is not None
    kept = {stdout.fileno(): b"", verdict.fileno(): b""}
    started = False
    deadline = time.monotonic() + START_SECONDS
    with selectors.DefaultSelector() as waiting:
        for one in kept:
            waiting.register(one, selectors.EVENT_READ)
        while waiting.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for key, _ in waiting.select(left):
                piece = os.read(key.fd, 1 << 16)
                if not piece:
                    waiting.unregister(key.fd)
                room = OUTPUT_BYTES - len(kept[key.fd])
                kept[key.fd] += piece[: max(0, room)]
            if not started and b"\n" in kept[verdict.fileno()]:
                started, deadline = True, time.monotonic() + timeout
        in_time = not waiting.get_map()
    return kept[stdout.fileno()], kept[verdict.fileno()], in_time


def _outcome(output: bytes, told: bytes, token: str, ending: str | int) -> Outcome:
    first, _, verdict = told.partition(b"\n")
    text = output.decode("utf-8", "replace")
    try:
        missing = tuple(json.loads(first))
    except ValueError as error:
        raise RunError(
            expected="a Python interpreter that starts isolated",
            found=(text.strip().splitlines() or [f"nothing from {sys.executable}"])[-1],
            fix="check that `python -I -S` runs",
        ) from error
    if verdict == token.encode():
        return Outcome(True, "passed", text, missing)
    if isinstance(ending, str):
        return Outcome(False, ending, text, missing)
    how = f"by signal {-ending}" if ending < 0 else f"with exit code {ending}"
    return Outcome(False, verdict.decode("utf-8", "replace") or f"ended before its tests did, {how}", text, missing)
