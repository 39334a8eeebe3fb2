"""What each adapter.method costs and works with, by training it for 20 steps over every quantisation.

    python -m benchmarks.adapter_methods NAME [--base tiny] [--rank 8] [--write-docs]

Each is trained, saved, opened by stock PEFT on the base as stock transformers loads it, merged with a certificate, and
reloaded by stock transformers; logits are compared with those of the trained model in memory. tests/e2e/test_methods.py
runs the same over a smaller base. Written to benchmarks/results/adapter_methods_NAME.json, and with --write-docs to the
table of docs/methods.md.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.record import RESULTS, write_result
from ift_peft.adapter_methods import Method
from ift_peft.adapters.merge import merge
from ift_peft.errors import Faults, RecipeError
from ift_peft.infer.load import open_parts
from ift_peft.model.quiet import quiet
from ift_peft.model.tokenizer import locate_base
from ift_peft.recipe import Recipe, load_recipe
from ift_peft.reporter import Silent
from ift_peft.train import run as runs
from ift_peft.train.session import Session

QUANTIZATIONS = ("none", "int8", "nf4")
DOCS = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- measured -->", "<!-- end of what is measured -->"
# Logits, which are about 10 in size here, may differ by the rounding of float32. int8 rounds the inputs of each layer
# as well, which a merged model does not: that may add twice what it does to the base's own logits.
BOUND = 1e-3
RECIPE = """
name: methods
base: {device: cpu}
adapter: {r: 4}
data: {train: rows.jsonl, test: test.jsonl, instruction: "cold or warm?", labels: [cold, warm]}
training: {max_steps: 20, per_device_train_batch_size: 4, learning_rate: 5.0e-3, save_strategy: "no", seed: 0}
evaluation: {forgetting: false, bootstrap_samples: 100}
"""
# Vectors need larger steps than matrices.
OWN: dict[str, tuple[str, ...]] = {
    "vera": ("training.learning_rate=5e-2",),
    "ia3": ("adapter.r=16", "training.learning_rate=5e-2"),
}


@dataclass(frozen=True)
class Case:
    """What was measured of a method over one quantisation.

    `bytes` are those of the adapter's weights, its gradients and AdamW's moments. All others are largest differences of
    logits: `moved` is what the adapter makes, `rounded` what becomes of the base's own by dequantising it. `stock` and
    `merged` are from the trained model to the adapter opened by stock PEFT, and to the merged model reloaded by stock
    transformers; `certified` is the certificate's, over the weights that the adapter was merged into.
    """

    method: str
    quantization: str
    trained: int
    bytes: int
    file_bytes: int
    moved: float
    rounded: float
    stock: float
    merged: float
    certified: float

    @property
    def merged_bound(self) -> float:
        return BOUND + 2 * self.rounded

    @property
    def faults(self) -> list[str]:
        """What is out of its bounds: nothing, where the method is supported."""
        bounds = (("stock", BOUND), ("merged", self.merged_bound), ("certified", BOUND))
        found = [f"{name} {found:.2e}" for name, most in bounds if not (found := getattr(self, name)) < most]
        return found + [f"moved {self.moved:.2e}"] * (not self.moved > 20 * BOUND)


def write_rows(folder: Path) -> None:
    """Sixty short invented rows and four held-out ones, and the recipe methods.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {"cold": ("snow", "ice", "frost", "sleet", "hail"), "warm": ("sun", "sand", "fire", "stove", "July")}
    rows = [{"text": f"{word} {n}", "label": label} for label in words for word in words[label] for n in range(6)]
    for name, part in (
        ("rows.jsonl", rows),
        ("test.jsonl", [{**row, "text": f"a {row['text']}"} for row in rows[::16]]),
    ):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    (folder / "methods.yaml").write_text(RECIPE, "utf-8")


def recipe_of(folder: Path, method: str, quantization: str, *overrides: str) -> Recipe:
    """Raises `RecipeError` or `Faults` for what cannot work."""
    own = (f"adapter.method={method}", f"base.quantization={quantization}", *overrides, *OWN.get(method, ()))
    return load_recipe(str(folder / "methods.yaml"), own)


def refusal(folder: Path, method: str, quantization: str) -> str | None:
    """What the recipe's schema has against it, if anything."""
    try:
        recipe_of(folder, method, quantization)
    except (RecipeError, Faults) as error:
        return str(error)
    return None


def measured(folder: Path, method: str, quantization: str, *overrides: str) -> Case:
    """Train, save, open, merge and reload one case in `folder`, which has been given to `write_rows`."""
    recipe = recipe_of(folder, method, quantization, *overrides)
    work = folder / f"{method}-{quantization}"
    with last_look() as seen:
        run = runs.train(recipe, root=work, reporter=Silent())
    with quiet():
        base = stock_base(recipe, quantization)
        stock = logits(PeftModel.from_pretrained(base, run.adapter).eval())
        rounded = furthest(logits(dequantized(stock_base(recipe, quantization))), seen["base"])
        result = merge(open_parts(run), output=work / "merged", dtype="float32", reporter=Silent())
        reloaded = logits(AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32).eval())
    return Case(
        method,
        quantization,
        int(run.read("manifest.json")["parameters"]["trained"]),
        seen["bytes"],
        (run.adapter / "adapter_model.safetensors").stat().st_size,
        furthest(seen["adapter"], seen["base"]),
        rounded,
        furthest(stock, seen["adapter"]),
        furthest(reloaded, seen["adapter"]),
        result.max_logit_difference,
    )


@contextmanager
def last_look() -> Iterator[dict[str, Any]]:
    """What the trained model and its base answer in memory, just before the adapter is saved, and what it took."""
    seen: dict[str, Any] = {}
    save = runs._save_adapter

    def look_and_save(session: Session, scores: dict[str, Any]) -> None:
        session.model.eval()
        seen["adapter"] = logits(session.model)
        with session.model.disable_adapter():
            seen["base"] = logits(session.model)
        seen["bytes"] = taken(session)
        save(session, scores)

    runs._save_adapter = look_and_save
    try:
        yield seen
    finally:
        runs._save_adapter = save


def taken(session: Session) -> int:
    """Bytes of the adapter's weights, of gradients as large as what is trained, and of the optimizer's moments."""
    base = {id(one) for name, one in session.model.named_parameters() if not _of_adapter(name)}
    tensors = [*session.model.named_parameters(), *session.model.named_buffers()]
    own = {id(one): one for name, one in tensors if _of_adapter(name) and id(one) not in base}
    trained = [one for one in session.model.parameters() if one.requires_grad]
    moments = [
        value
        for state in session.trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return sum(one.nbytes for one in (*own.values(), *trained, *moments))


def _of_adapter(name: str) -> bool:
    return any(part in name for part in ("lora_", "vera_", "ia3_"))


def stock_base(recipe: Recipe, quantization: str) -> Any:
    """The base as transformers itself loads it, in float32."""
    folder = locate_base(recipe.base.model).folder
    settings = {
        "none": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    }[quantization]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings).eval()
    if quantization == "nf4":  # packed, bitsandbytes computes in bfloat16 on some CPUs
        model.dequantize(dtype=torch.float32)
        model.is_loaded_in_4bit = False
    return model


def dequantized(model: Any) -> Any:
    if getattr(model, "is_loaded_in_8bit", False):
        model.dequantize(dtype=torch.float32)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(5, 45).reshape(2, 20)).logits.float()
    return found


def furthest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def table(cases: list[Case], folder: Path) -> list[str]:
    """Lines of Markdown: a row for each method."""
    lines = [
        "| method | trained parameters | adapter, gradients and AdamW, kB | adapter file, kB "
        f"| {' | '.join(QUANTIZATIONS)} | opened by stock PEFT |",
        "|---|--:|--:|--:|---|---|---|--:|",
    ]
    for method in get_args(Method):
        own = {case.quantization: case for case in cases if case.method == method}
        cells = " | ".join(_cell(own.get(one), refusal(folder, method, one)) for one in QUANTIZATIONS)
        first = next(iter(own.values()))
        sizes = f"{first.trained:,} | {first.bytes / 1e3:,.0f} | {first.file_bytes / 1e3:,.0f}"
        lines.append(f"| {method} | {sizes} | {cells} | {max(case.stock for case in own.values()):.1g} |")
    return lines


def _cell(case: Case | None, refused: str | None) -> str:
    if refused is not None:
        return "refused"
    assert case is not None
    return f"{'no' if case.faults else 'yes'}, {case.merged:.1g}"


def documented() -> list[str]:
    """The lines between the marks in docs/methods.md."""
    return DOCS.read_text("utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()


def main(
    name: Annotated[str, typer.Argument(help="Name of the result.")],
    base: Annotated[str, typer.Option(help="Base model.")] = "tiny",
    rank: Annotated[int, typer.Option(help="adapter.r where the method has one.")] = 8,
    write_docs: Annotated[bool, typer.Option(help="Put the table into docs/methods.md.")] = False,
) -> None:
    """Measure every method over every quantisation and print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_rows(folder)
        cases = []
        for method in get_args(Method):
            for quantization in QUANTIZATIONS:
                if refusal(folder, method, quantization) is None:
                    case = measured(folder, method, quantization, f"base.model={base}", f"adapter.r={rank}")
                    typer.echo(f"{case} {case.faults or 'within bounds'}", err=True)
                    cases.append(case)
        lines = table(cases, folder)
        refused = {
            f"{method}, {one}": why
            for method in get_args(Method)
            for one in QUANTIZATIONS
            if (why := refusal(folder, method, one))
        }
    typer.echo("\n".join(lines))
    result = {"base": base, "r": rank, "bound": BOUND, "cases": [asdict(case) for case in cases], "refused": refused}
    typer.echo(f"written to {write_result(f'adapter_methods_{name}', result, folder=RESULTS)}")
    if write_docs:
        text = DOCS.read_text("utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        DOCS.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", "utf-8")
    if any(case.faults for case in cases):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
