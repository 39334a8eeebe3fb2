"""The table of faults is kept only where it is all of it."""

from __future__ import annotations

import pytest

from tests.faults.table import Row, why_not_kept

GOOD = Row("runs", "a fault", "an error", "an error", passed=True)
BAD = Row("runs", "another", "an error", "", passed=False)


def test_a_table_of_all_rows_is_kept() -> None:
    assert why_not_kept([GOOD, GOOD], asked=2, outcomes=[]) is None


@pytest.mark.parametrize(
    ("rows", "asked", "outcomes", "why"),
    [
        ([GOOD], 1, ["failed"], "tests failed"),
        ([GOOD], 1, ["error", "skipped"], "tests error and skipped"),
        ([GOOD], None, [], "only a part"),
        ([GOOD], 2, [], "1 of 2 rows"),
        ([GOOD, BAD], 2, [], "1 of 2 rows"),
        ([], 0, [], "0 of 0 rows"),
    ],
    ids=["a test without a row", "skipped", "chosen by a word", "a row is missing", "a bad row", "nothing"],
)
def test_a_part_of_the_table_is_not(rows: list[Row], asked: int | None, outcomes: list[str], why: str) -> None:
    assert str(why_not_kept(rows, asked=asked, outcomes=outcomes)).startswith(why)
