"""Chat templates are programs that come with a base: what they may take, and the date they may not ask for.

transformers runs them in Jinja's sandbox, which keeps them away from Python but lets them run for ever and fill memory.
A template that is not ours is first tried in a process with bounds (`template_trial.py`), which also refuses powers and
large products; after that a clock stops what runs too long on the rows of a user (`within`). Not covered: a template
that, on rows of a user alone, fills memory, or spends its time in one long step of C that is no product.
"""

from __future__ import annotations

import ctypes
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from ift_peft.errors import ModelError, OutOfMemory, first_line
from ift_peft.trial import MEMORY, TakesMore, tried
from ift_peft.trial import SECONDS as TRIED_SECONDS

SECONDS = 60.0  # for the conversations of one call, of which there may be a thousand
_OURS = Path(__file__).resolve().parent.parent / "model" / "tiny" / "chat_template.jinja"
_NOW = re.compile(r"\bstrftime_now\s*\(\s*(?:format\s*=\s*)?(?P<quote>[\"'])(?P<format>[^\"'{}]*)(?P=quote)\s*\)")
_OTHERWISE = re.compile(r"\bstrftime_now\b(?!\s+is\s+(?:not\s+)?defined\b)")
_DAY = datetime(2024, 7, 26)  # what Llama's templates say where no clock is at hand
_TRIED = [
    [{"role": "user", "content": "1"}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}],
    [{"role": role, "content": "word " * 200} for role in ("system", "user", "assistant", "user", "assistant")],
]


class TooSlow(Exception):
    """Raised in a thread whose time is up."""


def of_one_day(template: str) -> str:
    """The template with a fixed day in the place of today's: prompts must be tomorrow what they were in training.

    Raises `ModelError` where it asks for the time in any other way than by a literal format.
    """
    fixed = _NOW.sub(lambda found: json.dumps(_DAY.strftime(found["format"])), template)
    if _OTHERWISE.search(fixed):
        raise ModelError(
            expected="a chat template that renders a conversation the same at any time",
            found="strftime_now in another use than with a format that is written there",
            fix="write a date into the chat template of the base's tokenizer",
        )
    return fixed


@lru_cache(maxsize=64)
def try_template(template: str, special: tuple[tuple[str, str], ...]) -> None:
    """Raises `ModelError` for a template that takes more time or memory for short conversations than any needs, could
    take it in one step, or could not be tried.
    """
    if _OURS.is_file() and template == _OURS.read_text("utf-8"):
        return
    given = {"template": template, "conversations": _TRIED, "special": dict(special)}
    try:
        found = tried("ift_peft.data.template_trial", given)
    except TakesMore:
        found = "one that takes more"
    if found is not None:
        raise ModelError(
            expected=f"a chat template that renders short conversations in {TRIED_SECONDS} s and, where the system "
            f"bounds it, {MEMORY >> 20} MiB, without powers and products of any size",
            found=found,
            fix="correct the chat template in the folder of the base, or use a base that you trust",
        )


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `TooSlow` in this thread, any one, when Python code in the block has run for longer.

    Raises `OutOfMemory` where there can be no further thread, for want of memory or by a limit.

    signal.setitimer would do so in the main thread alone, which serves no requests. Time in which the process was
    stopped, or other threads ran, does not count where the system tells a thread's own. What was asked for is never
    taken back: CPython 3.11 would look for it at every call from then on, and under a profiler for ever.
    """
    thread, lock, over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), threading.Event()
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    spent = _clock_of(threading.get_ident())
    end = spent() + seconds

    def watch() -> None:
        left = seconds
        while not over.wait(max(left, 0.01)):
            with lock:
                if over.is_set():
                    return
                left = end - spent()
                if left <= 0:
                    raise_in(thread, ctypes.py_object(TooSlow))
                    return

    try:
        threading.Thread(target=watch, daemon=True).start()
    except RuntimeError as error:
        raise OutOfMemory(
            expected="a thread for the clock over a chat template",
            found=first_line(error),
            fix="free memory, or raise a limit of it or of threads (ulimit -v, ulimit -u)",
        ) from None
    try:
        yield
    finally:
        with lock:
            over.set()
        for _ in range(10):  # what was raised at the last moment arrives here, not after the block
            pass


def _clock_of(thread: int) -> Callable[[], float]:
    """Seconds that a thread has run; where the system does not tell, seconds that passed."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.monotonic
    clock = time.pthread_getcpuclockid(thread)
    return lambda: time.clock_gettime(clock)
