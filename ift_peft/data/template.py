"""Chat templates are programs that come with a base: what they may take, and the date they may not ask for.

transformers runs them in Jinja's sandbox, which keeps them away from Python but lets them run for ever and fill memory.
A template that is neither ours nor TRL's is first tried in a process with bounds (`template_trial.py`); after that a
clock stops what runs too long on the rows of a user (`within`).
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from ift_peft.data import template_trial
from ift_peft.errors import ModelError

SECONDS = 60.0  # for the conversations of one call, of which there may be a thousand
_OURS = Path(__file__).resolve().parent.parent / "model" / "tiny" / "chat_template.jinja"
_NOW = re.compile(r"strftime_now\(\s*(?P<quote>[\"'])(?P<format>[^\"'{}]*)(?P=quote)\s*\)")
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
    if re.search(r"strftime_now\s*\(", fixed):
        raise ModelError(
            expected="a chat template that renders a conversation the same at any time",
            found="strftime_now with a format that is not written there",
            fix="write a date into the chat template of the base's tokenizer",
        )
    return fixed


@lru_cache(maxsize=64)
def try_template(template: str, special: tuple[tuple[str, str], ...]) -> None:
    """Raises `ModelError` for a template that takes more time or memory for short conversations than any needs."""
    if _OURS.is_file() and template == _OURS.read_text("utf-8"):
        return
    given = json.dumps({"template": template, "conversations": _TRIED, "special": dict(special)})
    command = [sys.executable, "-I", str(Path(template_trial.__file__))]
    try:
        code = subprocess.run(command, input=given.encode(), capture_output=True, timeout=10 * SECONDS).returncode
    except subprocess.TimeoutExpired:
        code = template_trial.TOO_MUCH
    if code == template_trial.TOO_MUCH or code < 0:
        raise ModelError(
            expected=f"a chat template that renders short conversations in {template_trial.SECONDS} s and "
            f"{template_trial.BYTES >> 20} MiB",
            found="one that takes more" if code != template_trial.TOO_MUCH else "one that takes more memory",
            fix="correct the chat template in the folder of the base, or use a base that you trust",
        )


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `TooSlow` in this thread, any one, when Python code in the block has run for longer.

    signal.setitimer would do so in the main thread alone, which serves no requests.
    """
    thread, lock, over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def stop() -> None:
        with lock:
            if not over:
                raise_in(thread, ctypes.py_object(TooSlow))

    clock = threading.Timer(seconds, stop)
    clock.daemon = True
    clock.start()
    try:
        yield
    finally:
        with lock:
            over = True
            raise_in(thread, None)  # not after the block any more
        clock.cancel()
