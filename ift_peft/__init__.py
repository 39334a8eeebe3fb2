"""Parameter-efficient instruction fine-tuning: one recipe in, one proven adapter out."""

import logging
from importlib.metadata import version

__version__ = version("ift_peft")

# It logs a line for every layer in every step of int8, and the absence of an optional kernel when it is imported.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
