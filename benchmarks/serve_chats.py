"""Many chats at once over many adapters, through the real server by OpenAI's client: lost none, equal, memory, speed.

    python -m benchmarks.serve_chats

One run of a few steps on `tiny`, and copies of it whose weights were changed, so that each adapter answers otherwise.
Every chat is asked first alone, which is its reference, then all at once and streamed, in rounds; the server's resident
memory is read after each. Written to benchmarks/results/serve_chats.json.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from openai import AsyncOpenAI

from benchmarks.record import write_result
from ift_peft.serve.store import Store
from tests.serve.conftest import Server
from tests.serve.tuned import changed_copy, record, train_briefly


def make_models(data: Path, count: int) -> list[str]:
    """Tuned models below `data` and in its store; their names."""
    first = train_briefly(data, "ftjob-0", adapter="{r: 8}")
    names, store = [], Store(f"sqlite:///{data / 'store.sqlite'}")
    for number in range(count):
        run = first if number == 0 else changed_copy(first, f"ftjob-{number}", number)
        names.append(f"ft:tiny:local:bench:{number:08}")
        record(store, data, run, names[-1])
    store.close()
    return names


def resident(server: Server) -> float:
    """MiB."""
    assert server.process is not None
    return float(psutil.Process(server.process.pid).memory_info().rss) / 2**20


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


async def measure(server: Server, names: list[str], **how: int) -> dict[str, Any]:
    chats = Chats(f"{server.url}/v1", names, how["chats"], how["tokens"])
    expected, alone = await chats.alone()
    found: dict[str, Any] = {"tokens_per_second_alone": alone, "rounds": []}
    found["tokens"] = sum(tokens for _, tokens in expected)
    found["different_texts"] = len({text for text, _ in expected})
    memory = [resident(server)]
    for _ in range(how["rounds"]):
        answers, rate = await chats.together()
        lost = [f"{type(one).__name__}: {one}" for one in answers if isinstance(one, BaseException)]
        for reason in lost:
            typer.echo(f"lost: {reason}", err=True)
        equal = sum(one == other for one, other in zip(answers, expected, strict=True))
        memory.append(resident(server))
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
        server = Server(data).start()
        try:
            found = asyncio.run(measure(server, names, chats=chats, tokens=tokens, rounds=rounds))
        finally:
            server.stop()
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
