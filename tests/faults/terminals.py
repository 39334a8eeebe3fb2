"""What a forked process does other than a command: its stderr is a terminal, or a pipe, or one of its steps hangs, or
finds little memory."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from tests.faults.fork_server import bound_memory, wrap


def on_terminal(terminal: str, *arguments: str) -> None:
    """A command whose terminal, with its stderr, is the one at the path `terminal`."""
    os.setsid()
    _into_stderr(os.open(terminal, os.O_RDWR))  # the first one that is opened becomes the terminal of the session
    _command(*arguments)


def into_pipe_without_reader(*arguments: str) -> None:
    """A command whose stderr nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    _into_stderr(writer)
    _command(*arguments)


def with_little_memory(more: str, *arguments: str) -> None:
    """A command that in training takes no more than so many bytes beyond those that it has when that begins."""

    @contextmanager
    def bounded() -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_AS)
        bound_memory(int(more))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)

    wrap(Trainer, "train", bounded)
    _command(*arguments)


class Sleeper(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            time.sleep(600)


class Slow(TrainerCallback):
    """Steps that take a moment each, so that a process can be stopped between them."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        time.sleep(0.05)


def hang() -> None:
    """Train small.yaml with a step that does not end, watched."""
    _train(Sleeper(), step_timeout=2)


def train_slowly() -> None:
    """Train small.yaml, watched by a watchdog that waits for two seconds."""
    _train(Slow(), step_timeout=2)


def _train(callback: TrainerCallback, *, step_timeout: float) -> None:
    from ift_peft.console import ConsoleReporter
    from ift_peft.recipe import load_recipe
    from ift_peft.train.run import train

    recipe = load_recipe("small.yaml", ())
    train(recipe, root=Path("runs"), reporter=ConsoleReporter(), callbacks=[callback], step_timeout=step_timeout)


def _into_stderr(fd: int) -> None:
    os.dup2(fd, 2)
    os.close(fd)


def _command(*arguments: str) -> None:
    import sys

    from ift_peft.cli import app

    sys.argv = ["ift", *arguments]
    app()
