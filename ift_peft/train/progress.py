"""What a checkpoint holds of a training beside transformers' own files, so that going on is as not having stopped."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """How far a training has come, over all processes that worked at it.

    `order` is the sha256, in hex, of the token ids of every batch so far, each hashed over the one before it: equal
    values mean equal rows in an equal order. `halvings`: how often the micro-batch was halved for lack of memory,
    the last time in the step `halved_at`.
    `first_losses` are those of the first steps, each over so many `first_tokens`, and `recent_losses` of the newest,
    the oldest first: cross-entropies in nats per supervised token.
    """

    tokens_seen: int = 0
    padded_tokens_seen: int = 0
    order: str = ""
    halvings: int = 0
    halved_at: int = 0
    first_losses: list[float] = field(default_factory=list)
    first_tokens: list[int] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)
    unlogged: dict[str, Any] = field(default_factory=dict)
    """Sums that the trainer has not logged yet."""

    def add_rows(self, ids: bytes) -> None:
        """Note the token ids of one more batch."""
        self.order = hashlib.sha256(bytes.fromhex(self.order) + ids).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Progress:
        return cls(**content)
