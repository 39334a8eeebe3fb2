from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from ift_peft.data.lines import text_lines
from ift_peft.data.sources import folder_has_split, read_source
from ift_peft.errors import Faults, IftPeftError


def read(path: Path, **options: bool) -> tuple[list[dict[str, object]], list[str]]:
    faults: list[IftPeftError] = []
    records = read_source(str(path), faults, **options)
    return [record.values for record in records], [str(fault) for fault in faults]


ROWS = [{"text": '他说："好"', "label": "正面"}, {"text": "two\nlines, and a comma", "label": "负面"}]


def write(tmp_path: Path, suffix: str) -> Path:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), "utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(ROWS), "utf-8")
    elif suffix == ".csv":
        path.write_bytes('\ufefftext,label\n"他说：""好""",正面\n"two\nlines, and a comma",负面\n'.encode())
    else:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_file_kind_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    assert read(write(tmp_path, suffix)) == (ROWS, [])


def test_tab_separated_cells_are_taken_literally_and_columns_numbered_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("\"open quote\t0\nit's fine\t1\n", "utf-8")
    rows, faults = read(path, header=False)
    assert rows == [{"0": '"open quote', "1": "0"}, {"0": "it's fine", "1": "1"}]
    assert not faults


def test_every_bad_line_is_named_and_the_good_ones_are_still_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n\n[1]\n{"text": "\xc4\xe3"}\n{"x": NaN}\n{"text": "b"}\n')
    rows, faults = read(path)
    assert rows == [{"text": "a"}, {"text": "b"}]
    assert len(faults) == 4
    for fault, line in zip(faults, (2, 4, 5, 6), strict=False):
        assert f"{path}:{line}" in "".join(faults), (fault, line)
    assert "byte 0xc4" in "".join(faults)


def test_a_csv_row_with_the_wrong_number_of_cells_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"a\nb",1\nc\nd,0\n', "utf-8")
    rows, faults = read(path)
    assert [row["label"] for row in rows] == ["1", "0"]
    assert len(faults) == 1
    assert f"{path}:4" in faults[0]


def test_deep_nesting_is_a_fault_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000 + "\n", "utf-8")
    rows, faults = read(path)
    assert rows == []
    assert f"{path}:1" in faults[0]


def test_a_folder_gives_the_files_of_the_split_or_all(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n', "utf-8")
    (tmp_path / "train-2.jsonl").write_text('{"text": "b"}\n', "utf-8")
    (tmp_path / "testament.jsonl").write_text('{"text": "c"}\n', "utf-8")
    faults: list[IftPeftError] = []
    assert [r.values["text"] for r in read_source(str(tmp_path), faults, split="train")] == ["b", "a"]
    assert not folder_has_split(str(tmp_path), "test")
    assert len(read_source(str(tmp_path), faults, split="test")) == 3
    assert not faults


def test_what_is_not_there_is_a_fault(tmp_path: Path) -> None:
    assert "nothing at" in read(tmp_path / "none.jsonl")[1][0]
    assert "found none" in read(tmp_path)[1][0]


@pytest.mark.filterwarnings("ignore")
def test_a_hub_id_without_network_is_a_fault_that_says_so() -> None:
    faults: list[IftPeftError] = []
    assert read_source("someone/some-set", faults) == []
    assert "the data set someone/some-set" in str(faults[0])


def test_a_key_twice_among_100_000_is_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    keys = ", ".join(f'"{number}": 0' for number in range(100_000))  # comparing each with each would take minutes
    path.write_text(f'{{{keys}, "99999": 1}}\n', "utf-8")
    assert "'99999' twice in one object" in read(path)[1][0]


def test_a_text_file_may_be_of_any_size_and_its_lines_of_16_mib(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    with path.open("wb") as file:
        file.write(b"first\n")
        for _ in range(70):
            file.write(b" " * (1 << 20) + b"\n")
        file.write("最后\n".encode())
    assert text_lines(path, setting="evaluation.general_text") == ["first", "最后"]
    path.write_bytes(b"\xff\n" + b"a" * (17 << 20) + b"\n")
    with pytest.raises(Faults) as told:
        text_lines(path, setting="evaluation.general_text")
    assert "byte 0xff" in str(told.value) and f"lines of at most 16 MiB\n   found a longer one at {path}:2" in str(
        told.value
    )
