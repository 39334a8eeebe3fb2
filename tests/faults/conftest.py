"""Rows of the table of faults.

`@pytest.mark.fault(group, fault, expected=...)` names one, with the test's parameters in braces; with `rare=True` it is
run under --all-faults only. `observed(...)` says what was seen. With --fault-table PAGE all are printed at the end, and
written there where every one is as expected.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.table import Row, as_markdown, read_rows
from tests.faults.trained import lab, server, shimmed

__all__ = ["lab", "server", "shimmed"]

FOLDER = "IFT_FAULT_ROWS"  # where the processes that run the tests leave their rows
Observed = Callable[[str], None]
_seen: dict[str, str] = {}


@pytest.fixture
def observed(request: pytest.FixtureRequest) -> Observed:
    """Say what came of the fault; to be called once, at the end of a test with the mark `fault`."""
    _seen.pop(request.node.nodeid, None)

    def say(text: str) -> None:
        _seen[request.node.nodeid] = text

    return say


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the rows with `rare=True`, unless all are asked for."""
    if config.getoption("--all-faults"):
        return
    rare = [item for item in items if (mark := item.get_closest_marker("fault")) and mark.kwargs.get("rare")]
    config.hook.pytest_deselected(items=rare)
    items[:] = [item for item in items if item not in rare]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    mark = item.get_closest_marker("fault")
    if mark is not None and call.when == "call":
        told = _seen.get(item.nodeid, "")
        if report.passed and not told:
            report.outcome, report.longrepr = "failed", "the test did not say what was observed"
        if FOLDER in os.environ and not report.skipped:
            group, fault = mark.args
            values = item.callspec.params if hasattr(item, "callspec") else {}
            row = Row(group, fault.format(**values), mark.kwargs["expected"].format(**values), told, report.passed)
            row.write(Path(os.environ[FOLDER]), re.sub(r"[^\w-]+", "_", item.nodeid))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    page = config.getoption("--fault-table")
    if page is None or hasattr(config, "workerinput"):
        return
    rows = read_rows(Path(os.environ[FOLDER]))
    terminalreporter.section("faults")
    for row in rows:
        sign = "ok " if row.passed else "NOT"
        terminalreporter.write_line(
            f"{sign} {row.group}: {row.fault}\n      expected {row.expected}\n      observed {row.observed}"
        )
    good = sum(row.passed for row in rows)
    terminalreporter.write_line(f"{good} of {len(rows)} faults came out as expected")
    if (
        rows
        and good == len(rows)
        and not terminalreporter.stats.get("error")
        and not terminalreporter.stats.get("skipped")
    ):
        Path(page).write_text(as_markdown(rows), "utf-8")
    else:
        terminalreporter.write_line(f"{page} is left as it was: something failed or was skipped")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fault-table", None) is not None and FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="ift_peft-faults-")
