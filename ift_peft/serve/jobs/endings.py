"""How a trainer's training can end, as the error of its job: by what it told, or by its exit code alone."""

from __future__ import annotations

from typing import Any

from ift_peft.errors import DiskFull, Diverged, Hung, IftPeftError, NonFiniteLoss, OutOfMemory

CODES: dict[type[IftPeftError], str] = {
    NonFiniteLoss: NonFiniteLoss.status,
    Diverged: Diverged.status,
    DiskFull: DiskFull.status,
    OutOfMemory: "insufficient_memory",  # as where the check foresees it
    Hung: Hung.status,
}
UNTOLD = {  # a watchdog ends the process at once, and a full disk may keep it from telling
    NonFiniteLoss.exit_code: (CODES[NonFiniteLoss], "a loss, a gradient or a weight was not a number"),
    Diverged.exit_code: (CODES[Diverged], "the loss diverged"),
    DiskFull.exit_code: (CODES[DiskFull], "there is no room on the server's disk for what training writes"),
    OutOfMemory.exit_code: (CODES[OutOfMemory], "training needs more memory than there is"),
    Hung.exit_code: (CODES[Hung], "a step of training did not end, and was ended"),
}


def code_of(error: IftPeftError) -> str | None:
    """The code of a job whose training ended by `error`; None for those that are no ending of training."""
    return next((code for kind, code in CODES.items() if isinstance(error, kind)), None)


def untold(exit_code: int) -> dict[str, Any]:
    """The error of a job whose trainer ended with `exit_code` and without a word."""
    code, message = UNTOLD.get(exit_code, ("internal_error", f"the trainer ended with {exit_code}"))
    return error_of(code, message)


def error_of(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """As a job shows it."""
    return {"code": code, "message": message[:4000], "param": param}
