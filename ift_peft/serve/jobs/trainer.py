"""The trainer of one job, a process of its own: `python -m ift_peft.serve.jobs.trainer <job folder> <parent>`.

It dies with the process that started it, and writes a checkpoint before that. One trainer works on a device at a time:
the next one waits until the lock of the last is free, also where that one lost its service. A GPU has one lock for all
services of a user, a CPU, which several may share, one in each data folder.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ift_peft.durable import write_atomically
from ift_peft.errors import (
    DataError,
    DiskFull,
    Faults,
    IftPeftError,
    ModelError,
    RecipeError,
    RunError,
    first_line,
    is_full,
    is_out_of_memory,
)
from ift_peft.loading import imports
from ift_peft.reporter import Silent
from ift_peft.serve.jobs.endings import UNTOLD, code_of, error_of
from ift_peft.serve.jobs.folder import JobFolder, newest_run

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from ift_peft.recipe import Recipe
    from ift_peft.train.prepare import Prepared

INTERRUPTED = 130
PR_SET_PDEATHSIG = 1
TOLD_EVERY_SECONDS = 0.3


class TooLarge(ModelError):
    """Training would need more memory than is free."""


class FileReporter:
    """Tells by lines of progress in the job's folder; of rows it is told numbers only."""

    def __init__(self, folder: JobFolder) -> None:
        self.folder = folder
        self._told = 0.0

    def note(self, text: str) -> None:
        self.folder.report("note", text=text)

    def stage(self, text: str, total: int) -> None:
        self._told = 0.0
        self.folder.report("stage", text=text, total=total)

    def advance(self, done: int, detail: str = "") -> None:
        if time.monotonic() - self._told >= TOLD_EVERY_SECONDS:
            self._told = time.monotonic()
            self.folder.report("done", done=done)

    def finish(self) -> None:
        self.folder.report("finish")


def main(folder: JobFolder, parent: int) -> int:
    """Check, train and measure what the folder's task says, or go on with it; the exit code."""
    _die_with(parent)
    signal.signal(signal.SIGTERM, _interrupt)
    sys.argv = ["ift", "serve"]  # what the run's manifest shows as its command
    folder, task = folder.taken()
    try:
        with _holding(lock_of(_device(task), Path(task["devices"]))):
            _work(folder, task)
    except IftPeftError as error:
        _leave(folder, _described(error, folder, task))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if is_full(error):
            _leave(folder, error_of(*UNTOLD[DiskFull.exit_code]))
            return DiskFull.exit_code
        traceback.print_exc()
        code = "insufficient_memory" if is_out_of_memory(error) else "internal_error"
        _leave(folder, error_of(code, _public(first_line(error), folder, task)))
        return 1
    return 0


def _leave(folder: JobFolder, error: dict[str, Any]) -> None:
    """Tell how it ended. On a full disk the exit code alone says it."""
    try:
        folder.write_error(error)
    except OSError as full:
        if not is_full(full):
            raise


def _work(folder: JobFolder, task: dict[str, Any]) -> None:
    from ift_peft.recipe import dump_recipe, validate
    from ift_peft.yaml_source import YamlSource

    with imports():
        from ift_peft.report.write import write_report
        from ift_peft.train.run import resume, train
    reporter, runs = FileReporter(folder), Path(task["runs"])
    recipe = validate(YamlSource("recipe", task["recipe"]))
    run = newest_run(runs, recipe.name)
    if run is not None and "inputs" not in run.read("manifest.json"):
        shutil.rmtree(run.path)  # it had not got as far as its rows
        run = None
    prepared = None
    if not task["checked"]:
        prepared = check(recipe, reporter)
        folder.report("checked")
    folder.report("begun")
    if run is None:
        train(recipe, root=runs, reporter=reporter, prepared=prepared, callbacks=[_telling_of_saves(folder)])
    elif run.status == "succeeded":
        write_report(run)  # all but this may have been done
    else:
        write_atomically(run.path / "recipe.yaml", dump_recipe(recipe))  # the data folder may have been moved
        resume(run, reporter=reporter, callbacks=[_telling_of_saves(folder)])


def _telling_of_saves(folder: JobFolder) -> TrainerCallback:
    """Tells each checkpoint that is written: who only looks at times finds those that are still there."""
    from transformers import TrainerCallback

    class Saves(TrainerCallback):
        def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            folder.report("saved", step=state.global_step, epoch=state.epoch, of=state.max_steps)

    return Saves()


def check(recipe: Recipe, reporter: FileReporter) -> Prepared:
    """What `recipe` makes of its rows: all of them give something to learn from, and the memory suffices.

    Raises `DataError` for rows without a supervised token, `TooLarge` where more memory is needed than is free, and
    what `prepare` raises.
    """
    from ift_peft.train.memory import foresee_memory
    from ift_peft.train.prepare import prepare

    prepared = prepare(recipe, reporter)
    unsupervised = _unsupervised(prepared)
    if unsupervised:
        raise DataError(
            expected="something to learn from in every row of training_file",
            found=f"{unsupervised} of {prepared.train.rows} rows without a token of an answer",
            fix="give each an assistant message with content",
        )
    foreseen = foresee_memory(recipe, prepared, Silent())  # told again when training begins
    if foreseen and foreseen["foreseen_bytes"] > foreseen["free_before_bytes"]:
        raise TooLarge(
            expected=f"about {foreseen['foreseen_bytes'] / 1e9:.2f} GB of memory for training",
            found=f"{foreseen['free_before_bytes'] / 1e9:.2f} GB free",
            fix="set a smaller batch_size, recipe.training.max_length, or recipe.base.quantization",
        )
    return prepared


def _unsupervised(prepared: Prepared) -> int:
    from ift_peft.data.render import IGNORE

    labels = prepared.train.dataset.select_columns(["labels"])
    return sum(all(label == IGNORE for label in row["labels"][1:]) for row in labels)  # nothing predicts the first


def _described(error: IftPeftError, folder: JobFolder, task: dict[str, Any]) -> dict[str, Any]:
    """An error as a job shows it."""
    first = error.faults[0] if isinstance(error, Faults) else error
    message = _public(str(error), folder, task)
    if isinstance(first, TooLarge):
        return error_of("insufficient_memory", message)
    ended = code_of(first)
    if ended is not None:
        return error_of(ended, message)
    if isinstance(first, DataError):
        param = "validation_file" if folder.validation.stem in message else "training_file"
        said = message.replace("a file as data.test", "a file as validation_file")  # as the parameters of a job say it
        return error_of(f"invalid_{param}", said, param)
    if isinstance(first, RecipeError) or (isinstance(first, ModelError) and _is_about_adapter(first)):
        return error_of("invalid_recipe", message, "recipe")
    if isinstance(first, ModelError):
        return error_of("model_unavailable", message, "model")
    return error_of("training_failed", message)


def _is_about_adapter(error: ModelError) -> bool:
    """Whether it is told of the base what the recipe's adapter section asks of it."""
    return any(word in text for text in (error.expected, error.fix) for word in ("adapter.", "target_modules"))


def _public(message: str, folder: JobFolder, task: dict[str, Any]) -> str:
    """A message without paths of this machine: files by the names of the parameters, the base by its public name."""
    model, data_dir = Path(task["recipe"]["base"]["model"]).expanduser(), Path(task["runs"]).parent
    names = {folder.training: folder.training.stem, folder.validation: folder.validation.stem, folder.path: "job"}
    names[data_dir] = "the data folder"
    if model.is_absolute() or model.exists():  # otherwise it is an id, or a word
        names |= {model: task["base"], model.resolve(): task["base"]}
    for path in sorted(names, key=lambda path: -len(str(path))):
        message = message.replace(str(path), names[path])
    return message


def _device(task: dict[str, Any]) -> str:
    """What the trainer will work on: `cpu`, or `cuda-` and what tells this GPU from all others."""
    import torch

    from ift_peft.model.base import choose_device

    device = choose_device(task["recipe"]["base"]["device"])
    return device.type if device.type == "cpu" else f"cuda-{torch.cuda.get_device_properties(device).uuid}"


def lock_of(device: str, folder: Path) -> Path:
    """The lock of a device: of a CPU in `folder`, of a GPU in a folder of the user's. Raises `RunError` where that
    belongs to somebody else."""
    if device != "cpu":
        folder = Path(tempfile.gettempdir()) / f"ift_peft-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
            raise RunError(expected=f"{folder} as a folder of this user", found="another one's", fix="set TMPDIR")
    return folder / f"{device}.lock"


@contextmanager
def _holding(lock: Path) -> Iterator[None]:
    """Have a device to itself; waits until it is free."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _die_with(parent: int) -> None:
    """Have the kernel send SIGTERM where the process (more exactly: the thread) that started this one ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before
        raise SystemExit(INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main(JobFolder(Path(sys.argv[1])), int(sys.argv[2])))
