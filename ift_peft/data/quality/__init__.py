"""Checks of training rows before they are trained on: what is found, and what is done about it."""

from ift_peft.data.quality.checks import find
from ift_peft.data.quality.cleaning import Cleaned, Dropped, apply
from ift_peft.data.quality.finding import KINDS, Example, Finding
from ift_peft.data.quality.personal_data import redact

__all__ = ["KINDS", "Cleaned", "Dropped", "Example", "Finding", "apply", "find", "redact"]
