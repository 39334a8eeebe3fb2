"""What each route asks of a key: the one table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ift_peft.serve.security.keys import Scope

GET, CHANGE = ("GET", "HEAD"), ("POST", "DELETE")


@dataclass(frozen=True)
class Rule:
    """Requests by method and path, and the scopes one of which they need; None for those that need no key."""

    methods: tuple[str, ...]
    path: re.Pattern[str]
    scopes: tuple[Scope, ...] | None


def _rule(methods: tuple[str, ...], path: str, *scopes: Scope, free: bool = False) -> Rule:
    return Rule(methods, re.compile(path), None if free else scopes)


RULES: Sequence[Rule] = (
    _rule(GET, r"/healthz", free=True),
    _rule(GET, r"/static/.+", free=True),
    _rule((*GET, *CHANGE), r"/(login|logout)", free=True),
    _rule(("POST",), r"/v1/(chat/)?completions", "inference"),
    _rule(GET, r"/v1/models(/.*)?", "inference", "read"),
    _rule(GET, r"/v1/(files|fine_tuning)(/.*)?", "read"),
    _rule(CHANGE, r"/v1/(files|fine_tuning|models)(/.*)?", "write"),
    _rule(GET, r"/openapi\.json", "read"),
    _rule(GET, r"/((jobs|files|start|playground)(/.*)?)?", "read"),
    # What forms do is asked of the API in its turn: those that may not are told on the page.
    _rule(CHANGE, r"/(jobs|files|start|playground)(/.*)?", "read"),
)


def scopes_for(method: str, path: str) -> tuple[Scope, ...] | None:
    """The scopes one of which a request needs, None where it needs no key. What no rule is about is for `admin`."""
    for rule in RULES:
        if method in rule.methods and rule.path.fullmatch(path):
            return rule.scopes
    return ("admin",)
