"""What a run folder keeps is what is read from it."""

from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path

import pytest
from safetensors import SafetensorError

from ift_peft.durable import disk_full
from ift_peft.errors import DiskFull
from ift_peft.plain_files import MiB
from ift_peft.recipe import load_recipe
from ift_peft.run_dir import LARGEST_RECORD, create_run


def test_lines_are_read_as_they_were_written_whatever_separators_texts_hold(tmp_path: Path) -> None:
    lines = [{"text": f"one{mark}two"} for mark in "\u2028\u2029\u0085\u000b\u000c\u001c\r\n"]
    run = create_run(load_recipe("sentiment"), tmp_path)
    run.write_lines("test.jsonl", lines)
    run.append("test.jsonl", {"text": "a\u2028b"})
    assert run.read_lines("test.jsonl") == [*lines, {"text": "a\u2028b"}]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_by_its_number_or_in_words(tmp_path: Path, number: int) -> None:
    assert isinstance(disk_full(OSError(number, "?"), tmp_path), DiskFull)
    assert disk_full(OSError(errno.EIO, "?"), tmp_path) is None
    for told, full in ((number, True), (errno.EIO, False)):
        error = SafetensorError(f"Error while serializing: I/O error: {os.strerror(told)} (os error {told})")
        assert isinstance(disk_full(error, tmp_path), DiskFull) == full


def test_a_record_takes_no_more_memory_than_it_is_long(tmp_path: Path) -> None:
    run = create_run(load_recipe("sentiment"), tmp_path)
    tracemalloc.start()
    assert run.status == "running"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * MiB < LARGEST_RECORD


@pytest.mark.parametrize("text", ["[enforce fail at inline_container.cc:672]", "basic_ios::clear: iostream error"])
def test_where_torch_does_not_say_why_it_could_not_write_the_folder_is_tried(tmp_path: Path, text: str) -> None:
    assert disk_full(RuntimeError(text), tmp_path) is None
    assert isinstance(disk_full(RuntimeError(text), tmp_path / "takes nothing"), DiskFull)
