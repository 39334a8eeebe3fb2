"""That a run needs no more room than it was foreseen to, and one that goes on no more than it still lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from ift_peft.errors import DiskFull
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir, open_run
from ift_peft.train import room
from ift_peft.train.arguments import checkpoints_kept
from ift_peft.train.checkpoints import rotate
from ift_peft.train.room import bytes_in, checkpoint_bytes
from ift_peft.train.run import resume, train
from ift_peft.train.session import Interrupted
from tests.train.small import small

PLAIN = ("adapter.embeddings=false", "training.max_steps=12")


class Watching(TrainerCallback):
    """Looks how many bytes the checkpoints take, and how many they are, when one has just got its name."""

    def __init__(self, *, stop_at: int | None = None) -> None:
        self.stop_at, self.peak, self.most = stop_at, 0, 0

    def look(self, folder: Path) -> None:
        self.peak = max(self.peak, bytes_in(folder))
        self.most = max(self.most, len(list(folder.glob("checkpoint-*"))))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.stop_at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (("training.save_strategy=steps", "training.save_steps=2"), 2),
        (("validation.every=2",), 3),
        (("validation.every=2", "training.save_total_limit=2"), 2),
    ],
)
def test_a_run_takes_no_more_room_than_was_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], kept: int
) -> None:
    watching = Watching()

    def watched(folder: Path, limit: int | None, *, best: int | None) -> None:
        watching.look(folder)
        rotate(folder, limit, best=best)

    monkeypatch.setattr("ift_peft.train.trainer.rotate", watched)
    run = train(small(tmp_path, *PLAIN, *settings), root=tmp_path / "runs", reporter=Silent())
    foreseen = run.read("manifest.json")["disk"]["foreseen_bytes"]
    assert watching.most == kept + 1
    assert foreseen >= watching.peak + bytes_in(run.adapter)
    assert foreseen < 1.5 * (watching.peak + bytes_in(run.adapter))
    if "training.save_total_limit=2" not in settings:
        assert len(list(run.checkpoints.glob("checkpoint-*"))) == checkpoints_kept("validation" in settings[0]) == kept


def test_a_run_that_goes_on_needs_only_what_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = ("training.save_strategy=steps", "training.save_steps=2")
    with pytest.raises(Interrupted):
        train(
            small(tmp_path, *PLAIN, *every),
            root=tmp_path / "runs",
            reporter=Silent(),
            callbacks=[Watching(stop_at=7)],
        )
    run = open_run(tmp_path / "runs" / "small", finished=False)
    there = bytes_in(run.checkpoints)
    lacking = run.read("manifest.json")["disk"]["foreseen_bytes"] - there
    assert there > lacking / 3
    monkeypatch.setattr(room, "free_room", lambda folder: lacking - 1)
    before = names(run)
    with pytest.raises(DiskFull) as caught:
        resume(run, reporter=Silent())
    assert "--runs-dir" not in caught.value.fix
    assert (names(run), run.status) == (before, "interrupted")
    monkeypatch.setattr(room, "free_room", lambda folder: lacking)
    assert resume(run, reporter=Silent()).status == "succeeded"


def names(run: RunDir) -> set[str]:
    return {path.name for path in run.checkpoints.iterdir()}


def test_of_each_weight_as_many_moments_as_its_optimizer_keeps() -> None:
    alone = checkpoint_bytes(10_000, optim="sgd")
    for optim, moments in (("adamw_torch", 8), ("lion_32bit", 4), ("lion_8bit", 1), ("paged_adamw_8bit", 2)):
        assert checkpoint_bytes(10_000, optim=optim) - alone == 10_000 * moments
