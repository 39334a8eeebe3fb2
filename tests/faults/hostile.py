"""The command line in a process of its own that is bounded in time and memory, and what it left."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.fork_server import give_up_capabilities

CRASHED = 70  # what the process ends with where an error got past the command line
MiB = 1 << 20


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (-1 where it had to be stopped), output, and what it took."""

    code: int
    out: str
    err: str
    seconds: float
    megabytes: int

    @property
    def crashed(self) -> bool:
        return self.code in (CRASHED, -1) or self.code > 128 or "Traceback (most recent call last)" in self.err

    @property
    def told(self) -> str:
        """The error as one line."""
        _, _, text = self.err.partition("error: ")
        return " ".join(text.split())[:300]


def ift(
    *arguments: str,
    cwd: Path,
    given: bytes = b"",
    seconds: float = 60.0,
    memory: int | None = None,
    before: Callable[[], None] | None = None,
) -> Ended:
    """`ift` with these arguments in a fork of this process, which has the libraries loaded already.

    `memory` caps the bytes that it may take beyond what it begins with; `before` is called in it first, to change what
    the process is.
    """
    with tempfile.TemporaryDirectory(prefix="ift_peft-fault-") as folder:
        streams = [Path(folder) / name for name in ("in", "out", "err")]
        streams[0].write_bytes(given)
        sys.stdout.flush()
        sys.stderr.flush()
        started = time.monotonic()
        with warnings.catch_warnings():  # of threads, from Python 3.12 on: those of pytest wait and hold nothing
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _command(arguments, cwd, streams, memory, before)
        usage = None
        while usage is None and time.monotonic() - started < seconds:
            found, status, used = os.wait4(pid, os.WNOHANG)
            if found:
                usage = used
            else:
                time.sleep(0.01)
        took = time.monotonic() - started
        if usage is None:
            os.kill(pid, signal.SIGKILL)
            _, _, usage = os.wait4(pid, 0)
            code = -1
        else:
            code = os.waitstatus_to_exitcode(status)
            code = 128 - code if code < 0 else code
        texts = [path.read_bytes().decode("utf-8", "backslashreplace") for path in streams[1:]]
        return Ended(code, *texts, took, usage.ru_maxrss // 1024)


def _command(
    arguments: tuple[str, ...],
    cwd: Path,
    streams: list[Path],
    memory: int | None,
    before: Callable[[], None] | None,
) -> None:
    """Never returns."""
    code = CRASHED
    try:
        for number, path in enumerate(streams):
            handle = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(handle, number)
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            number = ("stdin", "stdout", "stderr").index(name)
            errors = "backslashreplace" if name == "stderr" else "strict"  # as Python itself has them
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", errors=errors, closefd=False))
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        os.chdir(cwd)
        if memory is not None:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
        if before is not None:
            before()
        from ift_peft.cli import app

        sys.argv = ["ift", *arguments]
        app(list(arguments), prog_name="ift")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def without_rights() -> None:
    """Go on as a user whom rights of files hold for; root is none."""
    if os.geteuid() == 0:
        give_up_capabilities()
