"""What a full disk says. Imports nothing heavy."""

from __future__ import annotations

import errno


def is_full(error: BaseException) -> bool:
    """Whether an error is of a disk, or a share of it, without room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
