"""The process that `Forks` forks from: it imports all that a training needs, then makes a child for each command.

Started as `python -m tests.faults.fork_server`. It reads requests, a JSON object a line, from its stdin; to its stdout
go `{"pid": …}` for each child made and `{"pid": …, "status": …, "megabytes": …}` for each that ended, the status as
waitpid has it and the most memory that it held. It makes no thread, and ends with its children where its stdin is
closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

IMPORTED = (
    *("torch", "transformers", "peft", "trl", "ift_peft.train.run", "ift_peft.cli"),
    *("ift_peft.adapters.combine", "ift_peft.adapters.merge"),
)
PR_SET_PDEATHSIG = 1
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}


def serve(requests: int, answers: int) -> dict[str, Any]:
    """Answer requests until there are no more, which ends the process. It returns in each child, with its request."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    pending = b""
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            for answer in ended(children):
                os.write(answers, json.dumps(answer).encode() + b"\n")
        if requests not in ready:
            continue
        read = os.read(requests, 65536)
        if not read:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        *lines, pending = (pending + read).split(b"\n")
        for line in lines:
            pid = fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for fd in (woken, wake, requests, answers):
                    os.close(fd)
                request: dict[str, Any] = json.loads(line)
                return request
            children.add(pid)
            os.write(answers, json.dumps({"pid": pid}).encode() + b"\n")


def fork() -> int:
    """os.fork, which in a process with threads would copy locks that nobody opens."""
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("the server has threads, and cannot be forked")
    return os.fork()


def ended(children: set[int]) -> list[dict[str, int]]:
    """What is answered of each child that has ended; they are taken out of `children`."""
    found = []
    for pid in list(children):
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            found.append({"pid": pid, "status": status, "megabytes": used.ru_maxrss // 1024})
            children.remove(pid)
    return found


def become(request: dict[str, Any]) -> None:
    """Make this child the process that was asked for: working directory, environment, standard streams, argv."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    own = Path(request["own"])
    inputs = os.open(os.devnull, os.O_RDONLY)
    outputs = [os.open(own / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for name in ("stdout", "stderr")]
    for number, fd in enumerate((inputs, *outputs)):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)),
        encoding="utf-8",
        errors="backslashreplace",  # as Python itself has it
        line_buffering=True,
    )
    sys.argv = ["ift", *request["arguments"]]
    if request["memory"] is not None:
        bound_memory(request["memory"])
    if request["unprivileged"]:
        give_up_capabilities()


def bound_memory(more: int) -> None:
    """Let this process take no more than so many bytes beyond those that it has, until the limit is set back."""
    size = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.getrlimit(resource.RLIMIT_AS)[1]))


def give_up_capabilities() -> None:
    """Let rights of files hold for root as for others."""
    header, none = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)  # _LINUX_CAPABILITY_VERSION_3
    if ctypes.CDLL(None, use_errno=True).syscall(SYS_CAPSET[platform.machine()], header, none):
        raise OSError(ctypes.get_errno(), "capset")


class Shim:
    """The calls of shim.c, where the server was started with it."""

    def __init__(self) -> None:
        library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self.arm_at, self.disarm = library.fault_arm, library.fault_disarm

    def arm(self, own: Path, arm: dict[str, Any]) -> None:
        """Count into the file `calls`, and kill or fail as `arm` says; see `forks.Arm`."""
        pattern, log = os.fsencode(arm["pattern"]), os.fsencode(own / "calls")
        self.arm_at(pattern, log, arm["n"], arm["error"], int(arm["from_then_on"]))


class Watch:
    """Writes into the file `phase` what a training is at, and strikes at the save that is aimed at, or arms at once."""

    def __init__(self, own: Path, arm: dict[str, Any] | None) -> None:
        self.own, self.arm = own, arm
        self.phase = os.open(own / "phase", os.O_WRONLY | os.O_CREAT, 0o644)
        self.saves, self.inside = 0, False
        self.tell("preparing")
        if arm is not None and arm["save"] is None:
            Shim().arm(own, arm)

    def tell(self, phase: str) -> None:
        os.pwrite(self.phase, f"{phase:<10}".encode(), 0)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        self.tell("training")
        yield
        self.tell("measuring")

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        if self.inside:  # ours calls transformers'
            yield
            return
        self.saves, self.inside = self.saves + 1, True
        self.tell("saving")
        arm = self.arm if self.arm is not None and self.arm["save"] == self.saves else None
        if arm is not None and arm["pattern"]:
            Shim().arm(self.own, arm)
        elif arm is not None:
            os.kill(os.getpid(), arm["signal"])
        try:
            yield
        finally:
            if arm is not None and arm["pattern"] and not arm["from_then_on"]:
                Shim().disarm()
            self.inside = False
            self.tell("training")


def wrap(kind: type, name: str, around: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """Let every call of a class's own method `name` be within `around`."""
    if name not in vars(kind):
        return
    whole = getattr(kind, name)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with around():
            return whole(self, *args, **kwargs)

    setattr(kind, name, wrapped)


def observe(request: dict[str, Any]) -> None:
    """Have the trainers of transformers and our own watched."""
    from transformers import Trainer

    from ift_peft.train.trainer import SupervisedTrainer

    watch = Watch(Path(request["own"]), request["arm"])
    wrap(Trainer, "train", watch.training)
    for kind in (Trainer, SupervisedTrainer):
        wrap(kind, "_save_checkpoint", watch.saving)


def warm() -> None:
    """Fill what the libraries keep for as long as a process lasts, by what is done before weights are loaded."""
    import torch

    from ift_peft.model.memory import Batch, foresee
    from ift_peft.model.tokenizer import load_tokenizer, locate_base
    from ift_peft.sections import Adapter

    location = locate_base("tiny", revision=None)
    load_tokenizer(location).apply_chat_template([{"role": "user", "content": "?"}])
    foresee(location, Adapter(), Batch(rows=2, length=8, positions=2), dtype=torch.float32)


def main() -> None:
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a library prints on import is no answer
    for name in IMPORTED:
        importlib.import_module(name)
    warm()
    gc.collect()
    gc.freeze()
    os.write(answers, b'{"ready": true}\n')
    request = serve(requests, answers)
    become(request)
    observe(request)
    module, _, function = request["target"].partition(":")
    getattr(importlib.import_module(module), function)(*([] if function == "app" else request["arguments"]))


if __name__ == "__main__":
    main()
