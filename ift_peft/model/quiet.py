"""transformers and PEFT without progress bars, and without the advice that does not hold here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice; errors still show."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\b")
            # PEFT puts the whole embedding into checkpoints of an adapter on it; the final adapter goes without.
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
            # An adapter on a tied embedding: merging unties it (adapters/plan.py, in_memory.py).
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
            # PEFT sets it right by itself, for each module.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            # PEFT's own patterns, for experts: it looks for them among modules, where they are among parameters.
            warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys .*gate_up_proj")
            # A merged model quantised again says how; load_base says the same.
            warnings.filterwarnings("ignore", message="You passed `quantization_config` or equivalent")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
