"""The service as a process: what it answers where nothing is asked for, and one folder for one service."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest

from tests.serve.conftest import Server


@pytest.mark.slow
def test_what_is_not_there_is_an_error_that_the_client_can_read(server: Server) -> None:
    answer = httpx.get(f"{server.url}/v1/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"


@pytest.mark.slow
def test_a_second_service_over_the_same_folder_is_refused(server: Server) -> None:
    command = [sys.executable, "-m", "ift_peft", "serve", "--port", "0", "--data-dir", str(server.data_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 5
    assert "another service over it" in done.stderr
