"""Rows of the table of faults.

`@pytest.mark.fault(group, fault, expected=...)` names one, with the test's parameters in braces; with `rare=True` it is
run under --all-faults only. `observed(...)` says what was seen. With --fault-table PAGE all are printed at the end, and
written there where no test failed or was skipped, and none was left out.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.table import Row, as_markdown, read_rows, why_not_kept
from tests.faults.trained import lab, server, shimmed

__all__ = ["lab", "server", "shimmed"]

FOLDER = "IFT_FAULT_ROWS"  # where the processes that run the tests leave their rows
Observed = Callable[[str], None]
CHOSEN = "rows"  # in it, a file with how many rows there are, written where none was left out
_left_out: list[str] = []
_seen: dict[str, str] = {}


@pytest.fixture
def observed(request: pytest.FixtureRequest) -> Observed:
    """Say what came of the fault; to be called once, at the end of a test with the mark `fault`."""
    _seen.pop(request.node.nodeid, None)

    def say(text: str) -> None:
        _seen[request.node.nodeid] = text

    return say


@pytest.fixture(scope="session")
def every(pytestconfig: pytest.Config) -> bool:
    """Whether all that can be struck at is: --all-faults."""
    return bool(pytestconfig.getoption("--all-faults"))


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
    folder = Path(os.environ[FOLDER])
    rows, chosen = read_rows(folder), folder / CHOSEN
    terminalreporter.section("faults")
    for row in rows:
        sign = "ok " if row.passed else "NOT"
        terminalreporter.write_line(
            f"{sign} {row.group}: {row.fault}\n      expected {row.expected}\n      observed {row.observed}"
        )
    good = sum(row.passed for row in rows)
    terminalreporter.write_line(f"{good} of {len(rows)} faults came out as expected")
    why = why_not_kept(
        rows,
        asked=int(chosen.read_text("utf-8")) if chosen.exists() else None,
        outcomes=[outcome for outcome in ("failed", "error", "skipped") if terminalreporter.stats.get(outcome)],
    )
    if why is None:
        Path(page).write_text(as_markdown(rows), "utf-8")
    else:
        terminalreporter.write_line(f"{page} is left as it was: {why}")


def pytest_deselected(items: list[pytest.Item]) -> None:
    _left_out.extend(item.nodeid for item in items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave how many rows there will be, where all of them were chosen."""
    files = {item.path for item in session.items}
    whole = not _left_out and "::" not in "".join(session.config.args) and session.config.getoption("--all-faults")
    if FOLDER in os.environ and whole and files >= set(Path(__file__).parent.glob("test_*.py")):
        marked = sum(item.get_closest_marker("fault") is not None for item in session.items)
        (Path(os.environ[FOLDER]) / CHOSEN).write_text(str(marked), "utf-8")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fault-table", None) is not None and FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="ift_peft-faults-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True))
