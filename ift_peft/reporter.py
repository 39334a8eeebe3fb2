"""How long work tells what it is doing. Libraries report; only the command line prints."""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """What a caller can be told during a run."""

    def note(self, text: str) -> None:
        """A choice made, or a fact found, that the user should know."""

    def stage(self, text: str, total: int) -> None:
        """A stage of `total` units of work begins."""

    def advance(self, done: int, detail: str = "") -> None:
        """`done` units of the current stage are done."""

    def finish(self) -> None:
        """The current stage is over."""


class Silent:
    """A reporter that tells nothing."""

    def note(self, text: str) -> None: ...

    def stage(self, text: str, total: int) -> None: ...

    def advance(self, done: int, detail: str = "") -> None: ...

    def finish(self) -> None: ...
