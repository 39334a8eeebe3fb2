"""Many chats at once over many adapters, through the real server by OpenAI's client: lost none, equal, memory, speed.

    python -m benchmarks.serve_chats

One run of a few steps on `tiny`, and copies of it whose weights were changed, so that each adapter answers otherwise.
Every chat is asked first alone, which is its reference, then all at once and streamed, in rounds; the server's resident
memory is read after each. Written to benchmarks/results/serve_chats.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from openai import AsyncOpenAI
from safetensors.torch import load_file, save_file
from sqlalchemy import insert

from benchmarks.record import write_result
from ift_peft.recipe import load_recipe
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from ift_peft.serve.ids import new_id
from ift_peft.serve.store import Store
from ift_peft.serve.store.tables import models
from ift_peft.train.run import train


def make_models(data: Path, count: int) -> list[str]:
    """Tuned models below `data` and in its store; their names."""
    folder = data.parent / "recipe"
    folder.mkdir()
    rows = [
        [{"role": "user", "content": f"What is {n} plus one?"}, {"role": "assistant", "content": f"It is {n + 1}."}]
        for n in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), "utf-8")
    (folder / "recipe.yaml").write_text(
        "name: ftjob-0\nadapter: {r: 8}\ndata: {train: rows.jsonl}\ntraining: {max_steps: 4, learning_rate: 2e-2}\n"
        "evaluation: {forgetting: false}\n",
        "utf-8",
    )
    run = train(load_recipe(str(folder / "recipe.yaml")), root=data / "runs", reporter=Silent())
    names, store = [], Store(f"sqlite:///{data / 'store.sqlite'}")
    for number in range(count):
        own = run if number == 0 else changed(run, number)
        names.append(f"ft:tiny:local:bench:{number:08}")
        with store.begin() as connection:
            connection.execute(
                insert(models).values(
                    id=new_id("ftckpt"),
                    name=names[-1],
                    created_at=int(time.time()),
                    job=f"ftjob-{number}",
                    base="tiny",
                    run=str(own.path.relative_to(data)),
                    adapter=str(own.adapter.relative_to(data)),
                )
            )
    store.close()
    return names


def changed(run: RunDir, number: int) -> RunDir:
    """A copy of a run, as of another job, with other weights."""
    copy = RunDir(run.path.parent.parent / f"ftjob-{number}" / run.path.name)
    shutil.copytree(run.path, copy.path)
    weights = load_file(copy.adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(number)
    save_file(
        {name: one + 0.04 * torch.randn(one.shape, generator=generator) for name, one in weights.items()},
        copy.adapter / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    copy.update_manifest(adapter_sha256=copy.adapter_hashes())
    return copy


def start(data: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ift_peft", "serve", "--port", str(port), "--data-dir", str(data)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.getcwd()})
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5).close()
            return process, f"http://127.0.0.1:{port}/v1"
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the server did not start")


def resident(process: subprocess.Popen[bytes]) -> float:
    """MiB."""
    return float(psutil.Process(process.pid).memory_info().rss) / 2**20


class Chats:
    """The same chats, asked in one way or the other. An answer is its text and how many tokens it has."""

    def __init__(self, url: str, names: list[str], count: int, tokens: int) -> None:
        self.client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        self.asked: list[dict[str, Any]] = [
            {
                "model": names[number % len(names)],
                "messages": [{"role": "user", "content": f"Tell me about the number {number}."}],
                "temperature": 0,
                "max_tokens": tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            for number in range(count)
        ]

    async def one(self, given: dict[str, Any]) -> tuple[str, int]:
        text, tokens, ended = "", 0, False
        async for chunk in await self.client.chat.completions.create(**given):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                ended = ended or choice.finish_reason is not None
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        if not ended or not tokens:
            raise RuntimeError("an answer without its end")
        return text, tokens

    async def alone(self) -> tuple[list[tuple[str, int]], float]:
        begun = time.perf_counter()
        answers = [await self.one(given) for given in self.asked]
        return answers, sum(tokens for _, tokens in answers) / (time.perf_counter() - begun)

    async def together(self) -> tuple[list[tuple[str, int] | BaseException], float]:
        begun = time.perf_counter()
        answers = await asyncio.gather(*map(self.one, self.asked), return_exceptions=True)
        tokens = sum(one[1] for one in answers if not isinstance(one, BaseException))
        return list(answers), tokens / (time.perf_counter() - begun)


async def measure(url: str, names: list[str], process: subprocess.Popen[bytes], **how: int) -> dict[str, Any]:
    chats = Chats(url, names, how["chats"], how["tokens"])
    expected, alone = await chats.alone()
    found: dict[str, Any] = {"tokens_per_second_alone": alone, "rounds": []}
    found["tokens"] = sum(tokens for _, tokens in expected)
    found["different_texts"] = len({text for text, _ in expected})
    memory = [resident(process)]
    for _ in range(how["rounds"]):
        answers, rate = await chats.together()
        lost = [f"{type(one).__name__}: {one}" for one in answers if isinstance(one, BaseException)]
        for reason in lost:
            typer.echo(f"lost: {reason}", err=True)
        equal = sum(one == other for one, other in zip(answers, expected, strict=True))
        memory.append(resident(process))
        found["rounds"].append({"lost": len(lost), "equal": equal, "tokens_per_second": rate, "rss_mib": memory[-1]})
    found["rss_mib_before"] = memory[0]
    await chats.client.close()
    return found


def main(
    chats: Annotated[int, typer.Option(help="Chats at once.")] = 100,
    adapters: Annotated[int, typer.Option(help="Tuned models that they are over.")] = 8,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 48,
    rounds: Annotated[int, typer.Option(help="How often all are asked at once.")] = 5,
    name: Annotated[str, typer.Option(help="Name of the result.")] = "serve_chats",
) -> None:
    """Measure; exit code 1 where a chat was lost or answered otherwise than alone."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        names = make_models(data, adapters)
        process, url = start(data)
        try:
            found = asyncio.run(measure(url, names, process, chats=chats, tokens=tokens, rounds=rounds))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    typer.echo(f"{chats} chats over {adapters} adapters, {found['tokens']} tokens, {found['different_texts']} texts")
    typer.echo("| | lost | equal to alone | tokens/s | server's RSS, MiB |\n|---|---|---|---|---|")
    typer.echo(f"| one at a time | 0 | | {found['tokens_per_second_alone']:.0f} | {found['rss_mib_before']:.0f} |")
    for number, one in enumerate(found["rounds"], 1):
        typer.echo(
            f"| at once, round {number} | {one['lost']} | {one['equal']} | {one['tokens_per_second']:.0f} "
            f"| {one['rss_mib']:.0f} |"
        )
    found |= {"chats": chats, "adapters": adapters, "threads": os.environ.get("OMP_NUM_THREADS")}
    typer.echo(f"written to {write_result(name, found)}")
    if any(one["lost"] or one["equal"] != chats for one in found["rounds"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
