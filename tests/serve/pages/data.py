"""A data folder as a service leaves it, with a real run, and planted markup in everything that others can write."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbos import DBOSClient
from sqlalchemy import insert, update

from ift_peft.recipe import load_recipe
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.serve.ids import new_id
from ift_peft.serve.jobs.queue import NAME
from ift_peft.serve.store import Store
from ift_peft.serve.store.tables import events, files, jobs, models
from ift_peft.train.run import train
from tests.conftest import ROOT

PLANTED = "<script>document.title='planted'</script><img src=x onerror=document.title='planted'>"
A_DAY = 86400.0
REVIEWS = ROOT / "recipes" / "classification" / "sentiment.yaml"


def store_of(data_dir: Path) -> Store:
    return Store(f"sqlite:///{data_dir / 'store.sqlite'}")


def short_run(data_dir: Path, job_id: str) -> RunDir:
    """A run of a few steps with the scores of a few rows, where the jobs of the service have theirs."""
    recipe = load_recipe(
        str(REVIEWS),
        [
            f"name={job_id}",
            "base.quantization=none",
            "data.max_train_rows=24",
            "data.max_test_rows=12",
            "training.max_steps=3",
            "evaluation.unseen_instructions=null",
            "evaluation.perturbation=null",
            "evaluation.forgetting=false",
        ],
    )
    return train(recipe, root=data_dir / "runs", reporter=Silent())


def add_file(data_dir: Path, rows: Sequence[dict[str, Any]], filename: str, **values: Any) -> str:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    file_id = new_id("file")
    (data_dir / "files").mkdir(exist_ok=True)
    (data_dir / "files" / file_id).write_bytes(content)
    record = {
        "id": file_id,
        "created_at": int(time.time()),
        "filename": filename,
        "purpose": "fine-tune",
        "bytes": len(content),
        "rows": len(rows),
        "sha256": hashlib.sha256(content).hexdigest(),
        **values,
    }
    with store_of(data_dir).begin() as connection:
        connection.execute(insert(files).values(**record))
    return file_id


def add_job(data_dir: Path, **values: Any) -> str:
    now = int(time.time())
    record = {
        "id": new_id("ftjob"),
        "created_at": now,
        "status": "running",
        "model": "tiny",
        "base": "tiny",
        "recipe": {"adapter": {"r": 16, "embeddings": True}, "training": {"learning_rate": 1.2e-3}},
        "hyperparameters": {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"},
        "resolved": {"n_epochs": 3, "batch_size": 16, "learning_rate_multiplier": 1.0},
        "suffix": "refunds",
        "seed": 7,
        "training_file": "file-none",
        "started_at": now,
        "result_files": [],
        **values,
    }
    with store_of(data_dir).begin() as connection:
        connection.execute(insert(jobs).values(**record))
    if record["status"] == "running":
        hold(data_dir, str(record["id"]), 0)
    return str(record["id"])


def hold(data_dir: Path, job_id: str, attempt: int) -> None:
    """Put the attempt into the queue for another day: a service looks for jobs that the queue has not, and begins
    with them, but this one has nothing to begin with."""
    queue = data_dir / "queue.sqlite"
    if not queue.is_file():  # no service is at work there
        return
    client = DBOSClient(system_database_url=f"sqlite:///{queue}")
    try:
        client.enqueue(
            {
                "queue_name": NAME,
                "workflow_name": "attempt",
                "workflow_id": f"{job_id}.{attempt}",
                "delay_seconds": A_DAY,
            },
            job_id,
            attempt,
        )
    finally:
        client.destroy()


def change_job(data_dir: Path, job_id: str, **values: Any) -> None:
    with store_of(data_dir).begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(**values))


def add_model(data_dir: Path, job_id: str, run: RunDir, name: str, **values: Any) -> str:
    folder = str(run.path.relative_to(data_dir))
    record = {
        "id": new_id("ftckpt"),
        "name": name,
        "created_at": int(time.time()),
        "job": job_id,
        "base": "tiny",
        "run": folder,
        "adapter": f"{folder}/adapter",
        **values,
    }
    with store_of(data_dir).begin() as connection:
        connection.execute(insert(models).values(**record))
    return name


def tell(data_dir: Path, job_id: str, message: str, **values: Any) -> None:
    """An event of a job."""
    record = {
        "id": new_id("ftevent"),
        "job": job_id,
        "created_at": int(time.time()),
        "level": "info",
        "type": "message",
        "message": message,
        **values,
    }
    with store_of(data_dir).begin() as connection:
        connection.execute(insert(events).values(**record))


def tell_step(data_dir: Path, job_id: str, step: int, loss: float, *, total: int = 120) -> None:
    """The metrics event of one step."""
    data = {
        "step": step,
        "total_steps": total,
        "train_loss": loss,
        "train_mean_token_accuracy": 1 - loss / 8,
    }
    tell(data_dir, job_id, f"Step {step}/{total}: training loss={loss:.2f}", type="metrics", data=data)


def losses(steps: range) -> list[tuple[int, float]]:
    """A curve as training makes one: falling, with noise that is the same every time."""
    return [
        (step, 0.45 + 3.1 * math.exp(-step / 28) + 0.16 * math.sin(step * 2.399) / (1 + step / 40)) for step in steps
    ]


def conversations(count: int, *, answer: str = "delivery") -> list[dict[str, Any]]:
    """Invented rows in the form of the API, the last two the same as the first, with answers that repeat as classes."""
    rows = []
    for number in range(count):
        asked, told = [("请问可以退款吗", "退款"), ("where is my parcel", answer)][number % 2]
        messages = [
            {"role": "user", "content": f"{asked} {number // 2 if number < count - 2 else 0}"},
            {"role": "assistant", "content": told},
        ]
        rows.append({"messages": messages})
    return rows


def copy_run(run: RunDir, data_dir: Path, job_id: str) -> RunDir:
    """The same run as that of another job."""
    target = data_dir / "runs" / job_id / run.path.name
    shutil.copytree(run.path, target)
    return RunDir(target)
