"""Importing libraries that take seconds. Imports nothing heavy itself."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports() -> Iterator[None]:
    """Import in the block what takes long: faster, as nobody looks for garbage, of which imports leave next to none.

    What is there at its end is left out of later looks as well: accelerate has one before every training.
    """
    collecting, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if collecting:
            gc.enable()
