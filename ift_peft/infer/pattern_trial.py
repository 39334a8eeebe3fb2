"""Patterns of modules matched against a base's, in a process whose time and memory are bounded (`ift_peft.trial`)."""

from __future__ import annotations

import re
from typing import Any


def trial(given: dict[str, Any]) -> str | None:
    """Match the `patterns` in `given` against its `names` as PEFT does; what is no pattern is left for it to tell."""
    for pattern in given["patterns"]:
        for form in (pattern, rf"(.*\.)?({pattern})$"):
            try:
                compiled = re.compile(form)
            except re.error:
                continue
            for name in given["names"]:
                compiled.fullmatch(name)
    return None
