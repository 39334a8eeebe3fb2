"""One server over planted data, and one browser, for all tests of the dashboard."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ift_peft.run_dir import RunDir
from ift_peft.serve.ids import new_id
from tests.serve.conftest import Server
from tests.serve.pages import data

TUNED = "ft:tiny:local:reviews:Ab12Cd34"
MARKED = "ft:tiny:local:marked:Ef56Gh78"


@dataclass(frozen=True)
class Board:
    """A served data folder, and the ids of what is in it."""

    server: Server
    run: RunDir
    file: str
    marked_file: str
    done: str
    running: str
    failed: str

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def data_dir(self) -> Path:
        return self.server.data_dir

    @property
    def pages(self) -> dict[str, str]:
        """Every page by a name for it."""
        return {
            "jobs": "/",
            "done": f"/jobs/{self.done}",
            "running": f"/jobs/{self.running}",
            "failed": f"/jobs/{self.failed}",
            "files": "/files",
            "file": f"/files/{self.marked_file}",
            "start": "/start",
            "playground": "/playground",
            "login": "/login",
        }


def fill(folder: Path, done: str, run: RunDir) -> dict[str, Any]:
    """A job that succeeded, one that runs, one that failed, and files, with markup wherever a client may write."""
    file = data.add_file(folder, data.conversations(40), "support.jsonl")
    marked_file = data.add_file(folder, data.conversations(30, answer=data.PLANTED), f"{data.PLANTED}.jsonl")
    now = int(time.time())
    where = {"run": str(run.path.relative_to(folder)), "training_file": file}
    data.add_job(
        folder, id=done, status="succeeded", suffix="reviews", fine_tuned_model=TUNED, finished_at=now + 200, **where
    )
    data.add_model(folder, done, run, TUNED)
    data.add_model(folder, done, run, f"{TUNED}:ckpt-step-3", step=3, metrics={"train_loss": 1.5})
    running = data.add_job(folder, suffix="routing", training_file=file, estimated_finish=now + 3600)
    failed = data.add_job(
        folder,
        status="failed",
        suffix=data.PLANTED,
        training_file=marked_file,
        metadata={data.PLANTED: data.PLANTED},
        error={"code": "invalid_training_file", "message": data.PLANTED, "param": "training_file"},
    )
    for job_id, last in ((done, 120), (running, 40)):
        data.tell(folder, job_id, "Fine-tuning job started")
        for step, loss in data.losses(range(1, last, 2)):
            data.tell_step(folder, job_id, step, loss)
    data.tell(folder, failed, data.PLANTED, level="error")
    return {
        "run": run, "file": file, "marked_file": marked_file, "done": done, "running": running, "failed": failed
    }  # fmt: skip


@pytest.fixture(scope="package")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    folder = tmp_path_factory.mktemp("pages") / "data"
    folder.mkdir()
    done = new_id("ftjob")
    run = data.short_run(folder, done)
    server = Server(folder).start()
    # Behind the service's back, and after its start: it would go on with a job that runs.
    yield Board(server, **fill(folder, done, run))
    server.stop()
    assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    if shutil.which("chromium") is None:
        pytest.skip("needs a browser: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'ift_peft[dev]'")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Tab:
    """A page in a browser, with all that it complained of and asked for."""

    page: Any
    url: str
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, path: str) -> Any:
        return self.page.goto(self.url + path)

    def check(self, *, expected: tuple[str, ...] = ()) -> None:
        """Nothing was complained of but what is `expected`, and nobody else was asked for anything."""
        unforeseen = [one for one in self.complaints if not any(part in one for part in expected)]
        assert unforeseen == []
        assert [one for one in self.requests if not one.startswith(f"{self.url}/")] == []
        assert self.page.title() != "planted"


Browse = Callable[..., Any]


def until(tab: Tab, holds: Callable[[], bool], *, seconds: float = 20) -> None:
    """Wait for what a page is to become. Playwright's way evaluates a string, which the policy of the pages forbids."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, tab.page.content()
        tab.page.wait_for_timeout(50)


@pytest.fixture
def browse(chromium: Any, board: Board) -> Browse:
    """Open a tab in a browser of its own: `with browse(color_scheme="dark") as tab`."""

    @contextmanager
    def opened(*, url: str = board.url, expected: tuple[str, ...] = (), **settings: Any) -> Iterator[Tab]:
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 800}, **settings})
        context.set_default_timeout(20_000)
        tab = Tab(context.new_page(), url)
        tab.page.on("console", lambda message: tab.complaints.append(message.text))
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.page.on("request", lambda request: tab.requests.append(request.url))
        yield tab
        tab.check(expected=expected)
        context.close()

    return opened


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    """Where screenshots go: IFT_ARTEFACTS, or the test's own folder."""
    folder = Path(os.environ.get("IFT_ARTEFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
