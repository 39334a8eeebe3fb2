"""What many adapters on one base cost: a decoding step, loading, and answers per second, against stock PEFT.

    python -m benchmarks.many_adapters

A random Llama and random LoRA adapters on all its linear layers. A step gives 16 rows one token each after 32; the ways
take turns, so that all see the same machine, and their medians are compared, as time and as time on the processor,
which counts no other work on the machine. Written to benchmarks/results/many_adapters.json.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.record import write_result
from ift_peft.infer.engine import Engine
from ift_peft.infer.request import Request
from ift_peft.infer.rows import RowsCache, RowsModel, padded
from ift_peft.infer.stacked import StackedAdapters
from ift_peft.model.quiet import quiet
from ift_peft.model.tokenizer import TINY

ROWS, ADAPTERS, PROMPT = 16, 32, 32
END = 2


def make_base(hidden: int, layers: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            max_position_embeddings=1024,
        )
    ).eval()


def make_adapters(base: LlamaForCausalLM, r: int, folder: Path) -> list[Path]:
    """Folders of adapters as PEFT writes them, all of one form and each with weights of its own."""
    first = folder / "0"
    get_peft_model(copy.deepcopy(base), LoraConfig(r=r, target_modules="all-linear")).save_pretrained(first)
    shapes = load_file(first / "adapter_model.safetensors")
    config = (first / "adapter_config.json").read_bytes()
    for number in range(ADAPTERS):
        own = folder / str(number)
        own.mkdir(exist_ok=True)
        torch.manual_seed(number)
        save_file(
            {name: torch.randn_like(tensor) * 0.02 for name, tensor in shapes.items()},
            own / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        (own / "adapter_config.json").write_bytes(config)
    return [folder / str(number) for number in range(ADAPTERS)]


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def loading(base: LlamaForCausalLM, folders: list[Path]) -> tuple[list[list[float]], StackedAdapters]:
    """Seconds to load each adapter, thrice onto an empty stack; the last one is kept."""
    runs = []
    for _ in range(2):
        stack = StackedAdapters(base, max_adapters=ADAPTERS)
        runs.append([timed(partial(stack.load, folder.name, folder)) for folder in folders])
        stack.close()
    stack = StackedAdapters(base, max_adapters=ADAPTERS)
    runs.append([timed(partial(stack.load, folder.name, folder)) for folder in folders])
    return runs, stack


def stock_loading(base: LlamaForCausalLM, folders: list[Path]) -> tuple[list[float], PeftModel]:
    with quiet():
        start = time.perf_counter()
        model = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
        seconds = [time.perf_counter() - start]
        for folder in folders[1:]:
            seconds.append(timed(partial(model.load_adapter, str(folder), folder.name)))
    return seconds, model.eval()


def our_step(model: RowsModel, stack: StackedAdapters, slots: list[int], prompts: torch.Tensor) -> Callable[[], Any]:
    cache = RowsCache()
    stack.select(slots)
    _, kept = model.prompts(prompts.tolist())
    for row in range(ROWS):
        cache.join(kept, row, PROMPT)

    def step() -> None:
        stack.select(slots, keep=True)
        model.step([7] * ROWS, cache)

    return step


def stock_step(model: Any, names: list[str] | None, prompts: torch.Tensor) -> Callable[[], Any]:
    cache = DynamicCache()
    mixed: dict[str, Any] = {} if names is None else {"adapter_names": names}
    inputs = padded(prompts.tolist(), 0, prompts.device)
    with torch.no_grad():
        model(**inputs, past_key_values=cache, logits_to_keep=1, **mixed)

    @torch.no_grad()
    def step() -> None:
        width = cache.get_seq_length()
        model(
            input_ids=torch.full((ROWS, 1), 7),
            attention_mask=torch.ones((ROWS, width + 1), dtype=torch.long),
            position_ids=torch.full((ROWS, 1), width),
            past_key_values=cache,
            logits_to_keep=1,
            **mixed,
        )

    return step


def throughput(engine: Engine, requests: list[Request]) -> float:
    """Tokens a second."""
    start = time.perf_counter()
    tokens = sum(one.completion_tokens for one in engine.run(requests))
    return tokens / (time.perf_counter() - start)


def main(
    hidden: Annotated[int, typer.Option(help="Width of the base.")] = 512,
    layers: Annotated[int, typer.Option(help="Layers of the base.")] = 24,
    r: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    rounds: Annotated[int, typer.Option(help="Steps of each way.")] = 30,
    name: Annotated[str, typer.Option(help="Name of the result.")] = "many_adapters",
) -> None:
    """Measure and compare."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    base = make_base(hidden, layers, len(tokenizer))
    prompts = torch.randint(3, len(tokenizer), (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        folders = make_adapters(base, r, Path(folder))
        loads, stack = loading(base, folders)
        stock_loads, stock = stock_loading(make_base(hidden, layers, len(tokenizer)), folders)
    model = RowsModel(base, 0)
    slots = [stack.acquire(str(number)) for number in range(ROWS)]
    stock.set_adapter("0", inference_mode=True)
    ways = {
        "base": our_step(model, stack, [0] * ROWS, prompts),
        "one adapter": our_step(model, stack, [slots[0]] * ROWS, prompts),
        "16 adapters": our_step(model, stack, slots, prompts),
        "PEFT, one adapter": stock_step(stock, None, prompts),
        "PEFT, 16 adapters": stock_step(stock, [str(number) for number in range(ROWS)], prompts),
    }
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(rounds + 3):
        for way, step in ways.items():
            busy = time.process_time()
            took = timed(step)
            if turn >= 3:
                seconds[way].append((took, time.process_time() - busy))
    steps, busy_steps = (
        {way: statistics.median(one[which] for one in all_of) * 1e3 for way, all_of in seconds.items()}
        for which in (0, 1)
    )
    ratios, busy_ratios = (
        {
            "16 adapters / one": of["16 adapters"] / of["one adapter"],
            "16 adapters / PEFT's one": of["16 adapters"] / of["PEFT, one adapter"],
            "PEFT: 16 / one": of["PEFT, 16 adapters"] / of["PEFT, one adapter"],
            "one adapter / base": of["one adapter"] / of["base"],
        }
        for of in (steps, busy_steps)
    )
    typer.echo("| a step of 16 rows | ms | of them on the processor |\n|---|---|---|")
    for way, ms in steps.items():
        typer.echo(f"| {way} | {ms:.1f} | {busy_steps[way]:.1f} |")
    for what, ratio in ratios.items():
        typer.echo(f"{what}: {ratio:.2f}, on the processor {busy_ratios[what]:.2f}")
    of_ours = [statistics.median(times) * 1e3 for times in zip(*loads, strict=True)]
    of_stock = [one * 1e3 for one in stock_loads]
    typer.echo("| loading, ms | 1st | 2nd | 16th | 32nd |\n|---|---|---|---|---|")
    for who, times in (("stacked", of_ours), ("PEFT", of_stock)):
        typer.echo(f"| {who} | " + " | ".join(f"{times[at]:.0f}" for at in (0, 1, 15, 31)) + " |")
    requests = [
        Request(tuple(prompts[number % ROWS].tolist()), str(number % 8), 6 + number % 5, seed=number, temperature=1.0)
        for number in range(32)
    ]
    rates = {
        f"at most {rows}": throughput(
            Engine(base, tokenizer, end_token_ids={END}, adapters=stack, max_rows=rows), requests
        )
        for rows in (1, ROWS)
    }
    typer.echo("32 answers over 8 adapters, tokens/s: " + ", ".join(f"{way} {rate:.0f}" for way, rate in rates.items()))
    result = {
        "base": {"hidden": hidden, "layers": layers, "parameters": base.num_parameters()},
        "r": r,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "step_ms": steps,
        "step_processor_ms": busy_steps,
        "ratios": ratios,
        "processor_ratios": busy_ratios,
        "load_ms": {"stacked": of_ours, "peft": of_stock},
        "tokens_per_second": rates,
    }
    typer.echo(f"written to {write_result(name, result)}")


if __name__ == "__main__":
    typer.run(main)
