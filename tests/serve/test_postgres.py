"""The same service over Postgres. Needs a database: IFT_POSTGRES_URL=postgresql+psycopg://user@127.0.0.1/name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.serve.conftest import Server
from tests.serve.walk import walk


@pytest.mark.slow
@pytest.mark.skipif("IFT_POSTGRES_URL" not in os.environ, reason="needs a Postgres database: IFT_POSTGRES_URL")
def test_everything_goes_through_and_outlasts_a_restart(tmp_path: Path) -> None:
    server = Server(tmp_path / "data", ("--store-url", os.environ["IFT_POSTGRES_URL"]))
    server.data_dir.mkdir()
    server.start()
    walked = walk(server)
    assert all(status < 500 for _, _, status, _ in walked.answers)
    client = server.client()
    before = [job.to_dict() for job in client.fine_tuning.jobs.list()]
    server.stop()
    server.start()
    assert [job.to_dict() for job in client.fine_tuning.jobs.list()] == before
    assert {job["status"] for job in before} >= {"succeeded", "cancelled"}
    server.stop()
    assert not list(server.data_dir.glob("*.sqlite"))
