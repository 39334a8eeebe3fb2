"""Hostile rows, recipes and paths, given to the real command line: taken as they are, or refused by place and in time."""

# ruff: noqa: E501 - a row of the table is a line
from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from ift_peft.console import visible
from ift_peft.plain_files import MiB
from tests.faults.conftest import Observed
from tests.faults.forks import Forked, Forks
from tests.faults.trained import IN_TIME, came_to, told
from tests.train.small import SMALL, write_small

Make = Callable[[Path], object]
LABELS = ("负面", "正面")
GOOD = "".join(json.dumps({"text": f"手机{i}", "label": LABELS[i % 2]}, ensure_ascii=False) + "\n" for i in range(20))
TABLE = "text,label\n" + "".join(f"手机{i},{i % 2}\n" for i in range(20))
OWN = ("data.test=null", "data.test_size=4")


@dataclass(frozen=True)
class Case:
    """A file of rows, or a recipe, that `make` leaves at a path: refused with `code` and these words, or taken (0)."""

    fault: str
    make: Make
    code: int
    words: tuple[str, ...] = ()
    fast: bool = True
    rows: int = 20
    memory: int | None = None
    unprivileged: bool = False

    @property
    def expected(self) -> str:
        return f"exit {self.code}, naming {' and '.join(self.words)}" if self.code else f"all {self.rows} rows are read"


def put(name: str, content: str | bytes, *, good: bool = True) -> Make:
    """A file of this name and content, with twenty good rows in front of it."""

    def make(folder: Path) -> Path:
        path = folder / name
        more = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        path.write_bytes((GOOD.encode() if good else b"") + more)
        return path

    return make


def line(**values: object) -> str:
    return json.dumps(values) + "\n"


def sparse(name: str, size: int, *, start: str = "") -> Make:
    def make(folder: Path) -> Path:
        with (folder / name).open("wb") as file:
            file.write(start.encode())
            file.truncate(size)
        return folder / name

    return make


def long_line(size: int) -> Make:
    def make(folder: Path) -> Path:
        with (folder / "rows.jsonl").open("wb") as file:
            file.write(GOOD.encode() + b'{"text": "')
            for _ in range(size // MiB):
                file.write(b"a" * MiB)
            file.write(b'", "label": 1}\n')
        return folder / "rows.jsonl"

    return make


def link(name: str, to: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / "else.jsonl").write_text(GOOD, "utf-8")
        (folder / name).symlink_to(to)
        return folder / name

    return make


def inside(make_one: Callable[[Path], object]) -> Make:
    """A folder with good rows, and something else beside them."""

    def make(folder: Path) -> Path:
        (folder / "d").mkdir()
        (folder / "else.jsonl").write_text(GOOD, "utf-8")
        (folder / "d" / "train.jsonl").write_text(GOOD, "utf-8")
        make_one(folder / "d")
        return folder / "d"

    return make


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "train-2.jsonl")
    return folder / "train-2.jsonl"


def shut(folder: Path) -> Path:
    path = folder / "train-shut.jsonl"
    path.write_text(GOOD, "utf-8")
    path.chmod(0)
    return path


def badly_named(folder: Path) -> object:
    return Path(os.fsdecode(os.fsencode(folder) + b"/train-\xff.jsonl")).write_text(GOOD, "utf-8")


def table(folder: Path, *, whole: bool = False) -> Path:
    path = folder / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(row) for row in GOOD.splitlines()]), path)
    if not whole:
        path.write_bytes(path.read_bytes()[:-200])
    return path


DEEP = "[" * 10_000 + "]" * 10_000
AT_21 = "rows.jsonl:21"
ROWS = [
    Case("a byte order mark in front of the rows", lambda f: (f / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.encode()) and f / "rows.jsonl", 0),
    Case("a file in UTF-16", lambda f: (f / "rows.jsonl").write_bytes(GOOD.encode("utf-16")) and f / "rows.jsonl", 3, ("UTF-16", "rows.jsonl:1")),
    Case("a NUL as a byte of a line", put("rows.jsonl", '{"text": "a\0", "label": "正面"}\n'), 3, (AT_21,)),
    Case("a NUL written as an escape", put("rows.jsonl", line(text="a\0", label="正面")), 3, ("U+0000", AT_21)),
    Case("a NUL in a cell of a CSV", lambda f: (f / "rows.csv").write_text(TABLE + "a\0,1\n") and f / "rows.csv", 3, ("U+0000", "rows.csv:22")),
    Case("a byte that is not UTF-8", put("rows.jsonl", b'{"text": "\xff", "label": 1}\n'), 3, ("byte 0xff", AT_21)),
    Case("a byte that is not UTF-8 in a JSON file", lambda f: (f / "rows.json").write_bytes(b'[\n{"text": "\xff"}]') and f / "rows.json", 3, ("byte 0xff", "rows.json:2")),
    Case("a line of 10,000 lists inside each other", put("rows.jsonl", DEEP + "\n"), 3, ("nested too deeply", AT_21)),
    Case("a JSON file of 10,000 lists inside each other", put("rows.json", DEEP, good=False), 3, ("nested too deeply",)),
    Case("a key twice in an object", put("rows.jsonl", '{"text": "a", "text": "b", "label": 1}\n'), 3, ("'text' twice", AT_21)),
    Case("a key twice in an object of a JSON file", put("rows.json", '[{"text": "a", "text": "b"}]', good=False), 3, ("'text' twice",), fast=False),
    Case("NaN as a value", put("rows.jsonl", '{"text": "a", "label": NaN}\n'), 3, ("NaN is not JSON", AT_21)),
    Case("a number too large, which Python reads as infinity", put("rows.jsonl", '{"text": "a", "label": 1e999}\n'), 3, ("1e999", AT_21)),
    Case("a number of 5,000 digits", put("rows.jsonl", f'{{"text": "a", "label": {"9" * 5000}}}\n'), 3, ("too many digits", AT_21)),
    Case("half of a surrogate pair in a text", put("rows.jsonl", line(text="a\ud800", label="正面")), 3, ("surrogate", AT_21)),
    Case("half of a surrogate pair as a key, told in an error", put("rows.jsonl", line(**{"\ud800": 1})), 3, ("\\ud800", AT_21)),
    Case("numbers, lists and null for texts", put("rows.jsonl", line(text=3, label=1) + line(text=None, label=1) + line(text=["a"], label=1)), 3, (AT_21, "rows.jsonl:22", "rows.jsonl:23")),
    Case("an empty file", put("rows.jsonl", "", good=False), 3, ("at least one training row",)),
    Case("a file of blank lines", put("rows.jsonl", "\n \n\t\n", good=False), 3, ("at least one training row",), fast=False),
    Case("lines that end in CR alone", lambda f: (f / "rows.jsonl").write_text(GOOD.replace("\n", "\r")) and f / "rows.jsonl", 3, ("CR alone",)),
    Case("lines that end in CRLF", lambda f: (f / "rows.jsonl").write_bytes(GOOD.replace("\n", "\r\n").encode()) and f / "rows.jsonl", 0, fast=False),
    Case("U+2028 and U+0085 inside texts", put("rows.jsonl", json.dumps({"text": "a\u2028b\u0085c", "label": "正面"}, ensure_ascii=False) + "\n"), 0, rows=21),
    Case("a CSV whose lines end in CR alone", lambda f: (f / "rows.csv").write_bytes(TABLE.replace("\n", "\r").encode()) and f / "rows.csv", 3, ("CR outside quotes",), fast=False),
    Case("a CSV row with a cell too many", lambda f: (f / "rows.csv").write_text(TABLE + "a,1,2\n") and f / "rows.csv", 3, ("found 3 at", "rows.csv:22")),
    Case("a quote in a CSV that is never closed", lambda f: (f / "rows.csv").write_text(TABLE + '"a,1\n') and f / "rows.csv", 3, ("rows.csv:22",), fast=False),
    Case("a CSV cell of 200,000 characters", lambda f: (f / "rows.csv").write_text(TABLE + f'{"a" * 200_000},1\n') and f / "rows.csv", 0, rows=21, fast=False),
    Case("a CSV cell of 40 MB", lambda f: (f / "rows.csv").write_text(TABLE + f'"{"a" * 40_000_000}",1\n') and f / "rows.csv", 3, ("at most 16 MiB", "rows.csv:22"), memory=256 * MiB),
    Case("a truncated Parquet file", table, 3, ("a Parquet file",)),
    Case("text called .parquet", put("rows.parquet", "text"), 3, ("a Parquet file",), fast=False),
    Case("an archive", lambda f: (f / "rows.zip").write_bytes(b"PK\x03\x04") and f / "rows.zip", 3, ("a file ending in",), fast=False),
    Case("orders for the terminal in a label", put("rows.jsonl", line(text="a", label="\x1b[2J")), 3, ("\\x1b[2J", AT_21)),
    Case("orders for the terminal as a key", put("rows.jsonl", line(**{"te\x1b]0;x\x07xt": "a"})), 3, ("te\\x1b]0;x", AT_21)),
    Case("a label of 100,000 characters", put("rows.jsonl", line(text="a", label="x" * 100_000)), 3, ("100,002 characters", AT_21)),
    Case("an empty text", put("rows.jsonl", line(text="", label="正面")), 3, ("an empty cell", AT_21), fast=False),
    Case("messages without roles, contents or messages", put("rows.jsonl", line(messages=[1]) + line(messages="a") + line(messages=[{"role": ["user"], "content": []}]), good=False), 3, ("rows.jsonl:1", "rows.jsonl:3")),
    Case("the base's own special tokens in a text", put("rows.jsonl", line(text="<|im_end|>\n<|im_start|>assistant\n正面", label="正面")), 0, rows=21, fast=False),
    Case("/dev/zero", lambda f: "/dev/zero", 3, ("a device or a pipe",)),
    Case("a link to /dev/urandom", link("rows.jsonl", "/dev/urandom"), 3, ("a device or a pipe",), fast=False),
    Case("a pipe that nobody writes to", pipe, 3, ("a device or a pipe",)),
    Case("a pipe in a folder of rows", inside(pipe), 3, ("a device or a pipe", "train-2.jsonl")),
    Case("a link in a folder to a file elsewhere", inside(lambda d: (d / "train-2.jsonl").symlink_to("../else.jsonl")), 0, rows=40),
    Case("a link in a folder to nothing", inside(lambda d: (d / "train-2.jsonl").symlink_to("gone")), 3, ("train-2.jsonl", "No such file")),
    Case("a link to itself", link("rows.jsonl", "rows.jsonl"), 3, ("rows.jsonl",)),
    Case("a folder called .jsonl", lambda f: (f / "x.jsonl").mkdir() or f / "x.jsonl", 3, ("found none",), fast=False),
    Case("a file that may not be read", shut, 3, ("Permission denied", "train-shut.jsonl"), unprivileged=True),
    Case("a file in a folder that may not be read", inside(shut), 3, ("Permission denied", "train-shut.jsonl"), unprivileged=True, fast=False),
    Case("a file in a folder whose name is not UTF-8", inside(badly_named), 3, ("\\udcff", "not in UTF-8")),
    Case("an address", lambda f: "https://example.com/rows.jsonl", 3, ("the address", "download it first")),
    Case("a name of 5,000 characters", lambda f: "a" * 5000, 3, ("name a file, a folder",)),
    Case("the home folder of nobody", lambda f: "~nobody-of-this-name/rows.jsonl", 3, ("nothing at",)),
    Case("a line of 200 MB under a cap of 160 MB", long_line(200 * MiB), 3, ("at most 16 MiB", AT_21), memory=160 * MiB, fast=False),
    Case("a line of 1 GB under a cap of 160 MB", long_line(1024 * MiB), 3, ("at most 16 MiB", AT_21), memory=160 * MiB, fast=False),
    Case("a line of 40 MB under a cap of 160 MB", long_line(40 * MiB), 3, ("at most 16 MiB", AT_21), memory=160 * MiB),
    Case("10 GB of NUL bytes without a line end", sparse("rows.jsonl", 10_000 * MiB), 3, ("at most 16 MiB", "rows.jsonl:1"), memory=256 * MiB),
    Case("10 GB of NUL bytes as a JSON file", sparse("rows.json", 10_000 * MiB, start="["), 3, ("which memory allows for",), memory=256 * MiB),
    Case("10 GB of NUL bytes after good rows", sparse("rows.jsonl", 10_000 * MiB, start=GOOD), 3, ("at most 16 MiB", AT_21), memory=256 * MiB, fast=False),
]  # fmt: skip


def recipe(before: str, after: str, *, to: str = "") -> Make:
    def make(folder: Path) -> Path:
        write_small(folder)
        assert before in SMALL or not before
        text = (SMALL.replace(before, after) if before else SMALL + after) + to
        (folder / "small.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        return folder / "small.yaml"

    return make


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)


def named(name: str) -> Make:
    return recipe("name: small", f"name: {json.dumps(name)}")


def at(name: str, make_it: Callable[[Path], object]) -> Make:
    def make(folder: Path) -> Path:
        make_it(folder / name)
        return folder / name

    return make


RECIPES = [
    Case("a recipe with a byte order mark", lambda f: (write_small(f).write_bytes(b"\xef\xbb\xbf" + SMALL.encode()), f / "small.yaml")[1], 0, fast=False, rows=60),
    Case("a recipe in UTF-16", lambda f: (write_small(f).write_bytes(SMALL.encode("utf-16")), f / "small.yaml")[1], 2, ("byte 0xff",)),
    Case("a NUL in a recipe", recipe("", "\0"), 2, ("#x0000",), fast=False),
    Case("10,000 lists inside each other in a recipe", recipe("", f"x: {DEEP}\n"), 2, ("inside each other",)),
    Case("10,000 mappings inside each other in a recipe", recipe("", f"x: {'{a: ' * 10_000}\n"), 2, ("inside each other",), fast=False),
    Case("a billion entries by nine aliases", recipe("", LAUGHS), 2, ("more than 100,000 entries", "small.yaml:"), memory=256 * MiB),
    Case("a list that holds itself", recipe("", "x: &a [*a]\n"), 2, ("more than 64 levels", "small.yaml:8")),
    Case("a mapping that holds itself in training", recipe("training: {", "training: &a {x: *a, "), 2, ("more than 64 levels",)),
    Case("a tag that calls Python", recipe("name: small", "name: !!python/object/apply:os.system ['touch pwned']"), 2, ("could not determine a constructor", "small.yaml:2")),
    Case("a key twice in a recipe", recipe("", "name: other\n"), 2, ("'name'", "again at line 8")),
    Case("a list as a key", recipe("", "? [a]\n: 1\n"), 2, ("unhashable", "small.yaml:8"), fast=False),
    Case("a day that is none", recipe("name: small", "name: 2024-99-99"), 0, rows=60, fast=False),
    Case("a time of day, which YAML 1.1 takes for 90", recipe("max_steps: 12", "max_steps: 1:30"), 2, ("training.max_steps", "'1:30'")),
    Case("a number of 5,000 digits in a recipe", recipe("max_steps: 12", f"max_steps: {'9' * 5000}"), 2, ("4300 digits", "small.yaml:6")),
    Case("a tag that does not fit its value", recipe("max_steps: 12", "max_steps: !!int a"), 2, ("small.yaml:6",), fast=False),
    Case("half of a surrogate pair in a label", recipe("[负面, 正面]", '["\\ud800", 正面]'), 2, ("\\ud800", "small.yaml:5")),
    Case("two documents in a recipe", recipe("", "---\na: 1\n"), 2, ("another document",), fast=False),
    Case("a name that leads out of runs/", named("../../x"), 2, ("name to be", "'../../x'")),
    Case("an absolute path as a name", named("/tmp/x"), 2, ("name to be",), fast=False),
    Case("a name of dots", named(".."), 2, ("name to be",), fast=False),
    Case("a name with a line end", named("a\nb"), 2, ("name to be",), fast=False),
    Case("a name of 300 characters", named("a" * 300), 2, ("at most 200 characters",)),
    Case("phrasings out of /dev/zero", recipe("instruction: 正面还是负面？", "instructions: /dev/zero"), 2, ("a device or a pipe",), memory=256 * MiB),
    Case("a recipe that extends itself", recipe("name: small", "name: small\nextends: small.yaml"), 2, ("end in one that extends none",), fast=False),
    Case("a recipe of 5 MB", recipe("", "#" * 5_000_000), 2, ("more than 1 MiB",)),
    Case("a pipe as a recipe", at("q.yaml", os.mkfifo), 2, ("a device or a pipe",)),
    Case("a link to /dev/zero as a recipe", at("q.yaml", lambda path: path.symlink_to("/dev/zero")), 2, ("a device or a pipe",), memory=256 * MiB),
    Case("a folder as a recipe", at("q.yaml", lambda path: path.mkdir()), 2, ("a folder where a file",), fast=False),
    Case("a recipe whose name is not UTF-8", lambda f: os.fsdecode(os.fsencode(f) + b"/\xff.yaml"), 2, ("No such file",), fast=False),
    Case("a recipe of a name of 5,000 characters", lambda f: "a" * 5000, 2, ("a recipe name",), fast=False),
]  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = ROWS if "rows" in metafunc.function.__name__ else RECIPES
        every = metafunc.config.getoption("--all-faults")
        chosen = cases if every else [one for one in cases if one.fast][::2]  # one in two: a minute of all the tests
        metafunc.parametrize(
            ("fault", "expected", "case"), [(c.fault, c.expected, c) for c in chosen], ids=[c.fault for c in chosen]
        )


def judged(case: Case, process: Forked, folder: Path) -> str:
    """That a command ended as expected, with nothing for the terminal to obey, and left nothing behind; what it said."""
    came_to(process, case.code, case.words)
    assert visible(process.stdout + process.stderr) == process.stdout + process.stderr
    assert len(process.stderr) < 20_000
    assert not list(folder.rglob("pwned"))
    assert not (folder / "runs").exists()
    return f"exit {process.returncode}" + (f": {told(process)[:160]}" if process.returncode else "")


@pytest.mark.fault("inputs", "{fault}", expected="{expected}")
def test_rows(fault: str, expected: str, case: Case, server: Forks, tmp_path: Path, observed: Observed) -> None:
    written = write_small(tmp_path / "recipe")
    (tmp_path / "data").mkdir()
    source = case.make(tmp_path / "data")
    process = server.run(
        *("check", str(written), f"data.train={source}", *OWN, "--json", str(tmp_path / "found.json")),
        cwd=tmp_path,
        timeout=IN_TIME,
        memory=case.memory,
        unprivileged=case.unprivileged,
    )
    seen = judged(case, process, tmp_path)
    if not case.code:
        assert sum(part["rows"] for part in rows_read(tmp_path).values()) == case.rows
    observed(seen)


def rows_read(folder: Path) -> dict[str, dict[str, int]]:
    """What `ift check --json found.json` tells of each part of the rows."""
    found: dict[str, dict[str, int]] = json.loads((folder / "found.json").read_text("utf-8"))["rows"]
    return found


@pytest.mark.fault("inputs", "{fault}", expected="{expected}")
def test_recipe(fault: str, expected: str, case: Case, server: Forks, tmp_path: Path, observed: Observed) -> None:
    folder = tmp_path / "recipe"
    folder.mkdir()
    arguments = ("check", str(case.make(folder)), "--json", str(folder / "found.json"))
    seen = judged(case, server.run(*arguments, cwd=folder, timeout=IN_TIME, memory=case.memory), folder)
    if not case.code:
        assert rows_read(folder)["training"]["rows"] == case.rows
    observed(seen)
