"""Real processes of `ift` that start at once: forked, for each command, from one that has imported everything.

A fresh process takes six seconds to import torch and what stands on it; a fork of one that has takes none, and is a
process like another: it can be killed, its working directory, environment and standard streams are its own, its exit
status is what waitpid says. The limit: it has the modules that the server had, imported with the server's environment
and as the code was when the server started, what they keep of bases looked at, and one seed of hashes for all. What a
variable does on import, what is edited later, and what hangs on the order of sets, is not seen.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SHIM = Path(__file__).with_name("shim.c")
PATIENCE = 600.0  # seconds: of a machine that is busy with other things as well


@dataclass(frozen=True)
class Arm:
    """At the `n`-th call that changes a file whose path fits `pattern`, the process is killed, or the call fails.

    Without a pattern, which needs no shim, the process is sent `signal` when its save with the number `save` begins.
    `pattern` is fnmatch's, its stars span folders. `n` counts from 1; with 0 calls are counted and nothing happens.
    `error` is an errno, or 0 for SIGKILL; `from_then_on` lets every later call fail too. `save` is the number of the
    checkpoint's save in this process, from 1, in which calls are counted; None counts from the start.
    """

    pattern: str = ""
    n: int = 0
    error: int = 0
    from_then_on: bool = False
    save: int | None = None
    signal: int = signal.SIGKILL


class Forked:
    """A child of the server: as subprocess.Popen has it, with what it printed in files."""

    def __init__(self, forks: Forks, own: Path, request: dict[str, Any]) -> None:
        self._forks, self.own = forks, own
        self.started, self.seconds, self.megabytes = time.monotonic(), 0.0, 0
        self.returncode: int | None = None
        self.pid = forks._made(self, request)

    @property
    def stdout(self) -> str:
        return self._own("stdout")

    @property
    def stderr(self) -> str:
        return self._own("stderr")

    @property
    def calls(self) -> list[str]:
        """Each call that the shim counted, with its path."""
        return self._own("calls").splitlines()

    @property
    def phase(self) -> str:
        """What it is at, or was at in its end: preparing, training, saving or measuring."""
        return self._own("phase").strip() or "preparing"

    def _own(self, name: str) -> str:
        path = self.own / name
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def poll(self) -> int | None:
        self._forks._read(0)
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code, or the negative number of the signal. Raises `TimeoutError`, and leaves it running."""
        end = time.monotonic() + timeout
        while self.returncode is None:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{self.pid} has not ended after {timeout} s, at {self.phase}: {self.stderr}")
            self._forks._read(left)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """The server, and the processes forked from it; made by `forks`."""

    def __init__(self, folder: Path, shim: Path | None) -> None:
        self.folder, self.shim = folder, shim
        self._number = 0
        self._children: dict[int, Forked] = {}
        self._answers: list[dict[str, Any]] = []
        self._pending = b""
        offline = ROOT / "tests" / "offline"
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{offline}{os.pathsep}{ROOT}",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator has a thread otherwise
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "COLUMNS": "120",
        } | ({"LD_PRELOAD": str(shim)} if shim else {})
        self._log = (folder / "server").open("wb")
        self._server = subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", "-m", "tests.faults.fork_server"],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            self._take("ready", PATIENCE)
        except BaseException:
            self._server.kill()
            self.stop()
            raise

    def start(
        self,
        *arguments: str,
        cwd: Path,
        arm: Arm | None = None,
        env: Mapping[str, str] | None = None,
        unprivileged: bool = False,
        memory: int | None = None,
        target: str = "ift_peft.cli:app",
    ) -> Forked:
        """Start `ift` with these arguments, or another function `target`, which gets them.

        `env` is set beside the environment of the server; `unprivileged` lets rights of files hold for root; `memory`
        caps the bytes that it may take beyond what it begins with.
        """
        if arm is not None and arm.pattern and self.shim is None:
            raise RuntimeError("nothing can be armed without the shim: there was no C compiler")
        self._number += 1
        own = self.folder / str(self._number)
        own.mkdir()
        own.chmod(0o777)
        request = {
            "arguments": arguments,
            "cwd": str(cwd),
            "arm": arm and asdict(arm),
            "env": {**self.environment, **(env or {})},
            "own": str(own),
            "unprivileged": unprivileged,
            "memory": memory,
            "target": target,
        }
        return Forked(self, own, request)

    def run(self, *arguments: str, timeout: float = PATIENCE, **options: Any) -> Forked:
        """Start and wait. Raises `TimeoutError` after `timeout` seconds, and kills it."""
        process = self.start(*arguments, **options)
        try:
            process.wait(timeout)
        except TimeoutError:
            process.kill()
            process.wait()
            raise
        return process

    def stop(self) -> None:
        """End the server, and with it every process that is left."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()
        self._log.close()

    def _made(self, process: Forked, request: dict[str, Any]) -> int:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        pid = int(self._take("pid", PATIENCE)["pid"])
        self._children[pid] = process
        self._settle()
        return pid

    def _take(self, key: str, timeout: float) -> dict[str, Any]:
        """The next answer that has `key` and no status."""
        end = time.monotonic() + timeout
        while True:
            for answer in self._answers:
                if key in answer and "status" not in answer:
                    self._answers.remove(answer)
                    return answer
            if time.monotonic() > end:
                raise TimeoutError(f"no answer of the server: {self._said()}")
            self._read(end - time.monotonic())

    def _read(self, timeout: float) -> None:
        """Take in what the server has said, waiting for it up to `timeout` seconds."""
        assert self._server.stdout is not None
        fd = self._server.stdout.fileno()
        while select.select([fd], [], [], max(0.0, timeout))[0]:
            read = os.read(fd, 65536)
            if not read:
                raise RuntimeError(f"the server has ended: {self._said()}")
            *lines, self._pending = (self._pending + read).split(b"\n")
            self._answers += [json.loads(line) for line in lines]
            timeout = 0
        self._settle()

    def _settle(self) -> None:
        """Tell processes that have ended; a pid comes again only after its end was told."""
        for answer in [one for one in self._answers if "status" in one and one["pid"] in self._children]:
            self._answers.remove(answer)
            process = self._children.pop(answer["pid"])
            process.returncode, process.megabytes = os.waitstatus_to_exitcode(answer["status"]), answer["megabytes"]
            process.seconds = time.monotonic() - process.started

    def _said(self) -> str:
        return (self.folder / "server").read_text("utf-8", "replace")[-2000:]


def compile_shim(folder: Path) -> Path | None:
    """shim.c as a library in `folder`; None where there is no C compiler, or it is not Linux, or it
    fails: what it says is in the file cc."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "shim.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", library, SHIM, "-ldl"]
    made = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    (folder / "cc").write_text(made.stderr, "utf-8")
    return None if made.returncode else library


@contextmanager
def forks(folder: Path, *, shim: bool = True) -> Iterator[Forks]:
    """A server whose files lie in `folder`, with the shim where it can be compiled; it ends with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    one = Forks(folder, compile_shim(folder) if shim else None)
    try:
        yield one
    finally:
        one.stop()
