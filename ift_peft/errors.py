"""The error tree. Every error says what was expected, what was found, and how to fix it."""

from __future__ import annotations

import errno
from collections.abc import Sequence

# Of torch on a CPU, of CUDA and its libraries, of C++, which torch passes on as a RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "_status_alloc_failed")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class IftPeftError(Exception):
    """Base of every error that a user can cause and fix. The command line prints it and exits with `exit_code`."""

    exit_code = 1
    status = "failed"
    """What the manifest of a run says that it ended with."""

    def __init__(self, *, expected: str, found: str, fix: str) -> None:
        self.expected, self.found, self.fix = expected, found, fix
        super().__init__(f"expected {expected}\n   found {found}\n     fix {fix}")


class Faults(IftPeftError):
    """Several faults of one input, raised together."""

    def __init__(self, faults: Sequence[IftPeftError]) -> None:
        self.faults = tuple(faults)
        first = faults[0]
        super().__init__(expected=first.expected, found=first.found, fix=first.fix)
        self.exit_code = first.exit_code
        self.args = ("\n\n".join(str(fault) for fault in faults),)


def raise_all(faults: Sequence[IftPeftError]) -> None:
    """Raise nothing, the one fault, or all of them together."""
    if faults:
        raise Faults(faults) if len(faults) > 1 else faults[0]


def faults_of(what: str, error: IftPeftError) -> list[IftPeftError]:
    """An error, or each fault of several, as one of the part `what` of a whole."""
    faults = error.faults if isinstance(error, Faults) else (error,)
    return [type(one)(expected=f"{what}: {one.expected}", found=one.found, fix=one.fix) for one in faults]


def first_line(error: BaseException) -> str:
    """Type and first line of another library's error, to be told inside one of ours."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, of the system or of torch says that there was no memory. Imports no torch."""
    if isinstance(error, IftPeftError):
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in told for words in _NO_MEMORY)
    )


def is_full(error: BaseException) -> bool:
    """Whether an error of the system says that a disk, or a share of it, has no room, or no file may be so long."""
    return isinstance(error, OSError) and error.errno in FULL


class RecipeError(IftPeftError, ValueError):
    """A recipe that cannot be read or does not fit the schema."""

    exit_code = 2


class SettingsError(IftPeftError, ValueError):
    """Options of the service that it cannot be started with."""

    exit_code = 2


class DataError(IftPeftError, ValueError):
    """Rows that cannot be read, rendered or supervised."""

    exit_code = 3


class ModelError(IftPeftError, ValueError):
    """A base model, tokenizer or adapter that cannot be used as asked."""

    exit_code = 4


class BusyError(IftPeftError, RuntimeError):
    """No room at the moment: a full queue, or no slot for one more adapter. Nothing is wrong with what was asked."""


class RunError(IftPeftError, RuntimeError):
    """A run folder that is missing, unfinished, or does not match what it is used with."""

    exit_code = 5


class TrainingError(IftPeftError, RuntimeError):
    """Training that ended without a usable adapter."""

    exit_code = 6


class NonFiniteLoss(TrainingError):
    """A loss, a gradient or weights that are not numbers. What was learned before lies in the newest checkpoint."""

    exit_code = 10
    status = "non_finite_loss"


class Diverged(TrainingError):
    """A loss that has got stuck at guessing, or far above where it began."""

    exit_code = 11
    status = "diverged"


class DiskFull(IftPeftError, OSError):
    """No room for what has to be written. What was written before is whole."""

    exit_code = 12
    status = "disk_full"


class OutOfMemory(TrainingError):
    """More memory needed than there is, with one row at a time."""

    exit_code = 13
    status = "out_of_memory"


class Hung(TrainingError):
    """A step that does not end."""

    exit_code = 14
    status = "hung"


class MergeError(IftPeftError, RuntimeError):
    """A merge whose result differs from the adapter it was made from."""

    exit_code = 7


class GateMissed(IftPeftError, RuntimeError):
    """A run that is whole, and whose scores miss what its recipe asks of them."""

    exit_code = 8


class ExportError(IftPeftError, RuntimeError):
    """A run that cannot be had in the form asked for, or whose exported form is not the same."""

    exit_code = 9
