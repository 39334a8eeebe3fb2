"""What the service does with requests that nobody meant: none may end in an error of its own, hang, or be remembered.

    python -m benchmarks.fuzz_service --requests 10000

schemathesis makes them from the service's own OpenAPI document, valid and not, one by one and in chains in which an
answer feeds the next request, with new seeds until there were as many as asked for. A file of rows and a job are made
first, and their names mixed in. Written to benchmarks/results/fuzz_service.json: requests by status, memory, open files
and threads of the server from time to time, failures of schemathesis' checks.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

from benchmarks.record import write_result
from tests.serve.conftest import Server
from tests.serve.walk import FEW, rows

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
ENDED = (0, -signal.SIGTERM)  # as asked; uvicorn ends with the signal that it was given
LONGEST = 60.0  # seconds that any answer may take; more is a hang
METRIC = re.compile(r'ift_http_requests_total\{method="(\w+)",route="([^"]*)",status="(\d+)"\} ([\d.e+]+)')


def requests_by_status(server: Server) -> Counter[str]:
    """How many requests the server has answered, by status."""
    found: Counter[str] = Counter()
    text = httpx.get(f"{server.url}/metrics", timeout=LONGEST).raise_for_status().text
    for _, route, status, count in METRIC.findall(text):
        if route not in ("/metrics", "/healthz"):
            found[status] += int(float(count))
    return found


def usage(server: Server) -> dict[str, Any]:
    """Memory in bytes, open files and threads of the server."""
    assert server.process is not None
    process = psutil.Process(server.process.pid)
    with process.oneshot():
        return {
            "rss": process.memory_info().rss,
            "files": process.num_fds(),
            "threads": process.num_threads(),
            "connections": len(process.net_connections()),
        }


def fuzz(
    server: Server, *, seed: int, examples: int, folder: Path, known: dict[str, list[str]]
) -> tuple[int, list[str]]:
    """One run of schemathesis: its exit code, and the first line of each failure."""
    report = folder / f"{seed}.json"
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"),
        *("--checks", CHECKS, "--phases", "examples,coverage,fuzzing,stateful", "--mode", "all"),
        *("--max-examples", str(examples), "--seed", str(seed), "--request-timeout", str(LONGEST)),
        *("--generation-database", "none", "--continue-on-failure", "--suppress-health-check", "all"),
        *("--warnings", "off", "--report", "json", "--report-json-path", str(report)),
    ]
    env = {**os.environ, "SCHEMATHESIS_HOOKS": "benchmarks.fuzz_hooks", "IFT_FUZZ_KNOWN": json.dumps(known)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200, cwd=folder, env=env)
    (folder / f"{seed}.txt").write_text(done.stdout + done.stderr, "utf-8")
    return done.returncode, re.findall(r"^- (.+)$", done.stdout, flags=re.MULTILINE)


def main(
    requests: Annotated[int, typer.Option(help="At least so many requests.")] = 10_000,
    examples: Annotated[int, typer.Option(help="Of each operation in a run of schemathesis.")] = 60,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(folder / "data", ("--requests-per-minute", "100000000"))
        server.data_dir.mkdir()
        server.start()
        try:
            result = _until(server, requests, examples, folder)
        finally:
            code = server.stop(timeout=120)
        result |= {"exit_code": code, "tracebacks": server.log.count("Traceback")}
        for path in sorted(folder.glob("*.txt")) if result["failures"] else []:
            print(path.read_text("utf-8"))
    print(json.dumps({key: value for key, value in result.items() if key != "usage"}, indent=2))
    print("usage", *result["usage"], sep="\n")
    write_result("fuzz_service", result)
    bad = sum(count for status, count in result["by_status"].items() if status.startswith("5"))
    raise typer.Exit(int(bool(bad or result["failures"] or result["tracebacks"] or code not in ENDED)))


def _until(server: Server, requests: int, examples: int, folder: Path) -> dict[str, Any]:
    client = server.client()
    uploaded = client.files.create(file=("rows.jsonl", rows(10)), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded, extra_body={"recipe": FEW}).id
    known = {"model": ["tiny"], "training_file": [uploaded], "file": [uploaded], "job": [job]}
    client.completions.create(model="tiny", prompt="好", max_tokens=1)  # the base is loaded before memory is looked at
    began, seen, failures, seed = time.monotonic(), [usage(server)], [], 0
    while sum(requests_by_status(server).values()) < requests:
        seed += 1
        code, found = fuzz(server, seed=seed, examples=examples, folder=folder, known=known)
        failures += found or ([f"schemathesis ended with {code}"] if code else [])
        seen.append(usage(server))
        print(f"seed {seed}: {dict(requests_by_status(server))} {seen[-1]}", flush=True)
    by_status = requests_by_status(server)
    return {
        "requests": sum(by_status.values()),
        "by_status": dict(sorted(by_status.items())),
        "failures": failures,
        "seeds": seed,
        "usage": seen,
        "seconds": round(time.monotonic() - began, 1),
    }


if __name__ == "__main__":
    typer.run(main)
