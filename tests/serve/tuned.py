"""Tuned models of a few steps, as a finished job leaves them: a run below the data folder and its records."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sqlalchemy import insert

from ift_peft.recipe import load_recipe
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.serve.ids import new_id
from ift_peft.serve.store import Store
from ift_peft.serve.store.tables import models
from ift_peft.train.run import train

SYSTEM = "Answer briefly."
ROWS = [(f"What is {number} plus one?", f"It is {number + 1}.") for number in range(12)]


def train_briefly(data_dir: Path, job: str, *, adapter: str = "{r: 4}", base: str = "{model: tiny}") -> RunDir:
    """A run of four steps with checkpoints after two and four."""
    folder = data_dir.parent / f"{job}-recipe"
    folder.mkdir()
    messages = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in ROWS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in messages), "utf-8")
    (folder / "recipe.yaml").write_text(
        f"name: {job}\nbase: {base}\nadapter: {adapter}\ndata: {{train: rows.jsonl, system: {SYSTEM}}}\n"
        "training: {max_steps: 4, learning_rate: 2e-2, save_strategy: steps, save_steps: 2, save_total_limit: 4}\n"
        "evaluation: {forgetting: false}\n",
        "utf-8",
    )
    return train(load_recipe(str(folder / "recipe.yaml")), root=data_dir / "runs", reporter=Silent())


def changed_copy(run: RunDir, job: str, seed: int) -> RunDir:
    """A run like another, whose adapter has other weights: as another seed would have made it, in no time."""
    copy = RunDir(run.path.parent.parent / job / run.path.name)
    shutil.copytree(run.path, copy.path)
    weights = load_file(copy.adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    save_file(
        {name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()},
        copy.adapter / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    copy.update_manifest(adapter_sha256=copy.adapter_hashes())
    return copy


def record(store: Store, data_dir: Path, run: RunDir, name: str, *, step: int | None = None) -> None:
    """What a job that succeeded writes for its model, or for a checkpoint of it."""
    adapter = run.adapter if step is None else run.checkpoints / f"checkpoint-{step}"
    with store.begin() as connection:
        connection.execute(
            insert(models).values(
                id=new_id("ftckpt"),
                name=name,
                created_at=int(time.time()),
                job=run.path.parent.name,
                base="tiny",
                step=step,
                run=str(run.path.relative_to(data_dir)),
                adapter=str(adapter.relative_to(data_dir)),
            )
        )
