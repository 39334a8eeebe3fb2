"""What a run folder keeps is what is read from it."""

from __future__ import annotations

from pathlib import Path

from ift_peft.recipe import load_recipe
from ift_peft.run_dir import create_run


def test_lines_are_read_as_they_were_written_whatever_separators_texts_hold(tmp_path: Path) -> None:
    lines = [{"text": f"one{mark}two"} for mark in "\u2028\u2029\u0085\u000b\u000c\u001c\r\n"]
    run = create_run(load_recipe("sentiment"), tmp_path)
    run.write_lines("test.jsonl", lines)
    run.append("test.jsonl", {"text": "a\u2028b"})
    assert run.read_lines("test.jsonl") == [*lines, {"text": "a\u2028b"}]
