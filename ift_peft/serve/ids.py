"""Opaque names of what the service keeps."""

from __future__ import annotations

import secrets
import string

ALPHABET = string.ascii_letters + string.digits


def new_id(prefix: str) -> str:
    """`prefix`-… with 24 random letters and digits (142 bits), as in `file-…`, `ftjob-…`, `ftevent-…`, `ftckpt-…`."""
    return f"{prefix}-{random_name(24)}"


def random_name(length: int) -> str:
    """Letters and digits that nobody can guess, where there are enough of them."""
    return "".join(secrets.choice(ALPHABET) for _ in range(length))
