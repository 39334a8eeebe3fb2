"""Which attribution ranks tokens best: what a run's score loses when the pieces ranked highest are taken out.

    python -m benchmarks.explain_deletion sentiment runs/sentiment/latest

Each held-out text is asked about the answer the run gives it. A growing share of the text's pieces is taken out, the
strongest first, the weakest first, or drawn at random; once by shortening the prompt, once by putting padding in their
place. The fall of the answer's log-odds, with its 95 % bootstrap interval over texts, is written to
benchmarks/results/explain_deletion_NAME.json.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from captum.attr import InputXGradient, IntegratedGradients
from torch import Tensor

from benchmarks.record import write_result
from ift_peft.console import ConsoleReporter
from ift_peft.data.row import Row
from ift_peft.evaluate.intervals import percentile
from ift_peft.explain.attribution import STEPS, attribute, kept_tokens
from ift_peft.explain.pieces import Piece, prompt_pieces
from ift_peft.explain.score import Score, answer_score
from ift_peft.infer.likelihood import label_probabilities
from ift_peft.infer.load import Parts, held_out_rows, load_model, open_parts
from ift_peft.run_dir import open_run

SHARES = (0.1, 0.2, 0.3, 0.5)
DRAWS = 10
REMOVALS = ("deleted", "padded")
Falls = dict[tuple[str, str, str, float], list[float]]  # removal, method, order, share


class Asked:
    """One text with the score of the answer that the run gives it."""

    def __init__(self, model: Any, parts: Parts, row: Row) -> None:
        self.model, self.pad_token_id = model, int(parts.tokenizer.pad_token_id)
        self.prompt, self.pieces = prompt_pieces(parts.renderer, row.prompt, row.text)
        (chances,) = label_probabilities(model, parts.renderer, [row.prompt], parts.labels, batch_size=1)
        rendered = parts.renderer.render([(*row.prompt, {"role": "assistant", "content": w}) for w in parts.labels])
        self.score: Score = answer_score(self.prompt.ids, rendered, chosen=int(chances.argmax()))
        self.own = [number for number, piece in enumerate(self.pieces) if piece.kind == "text"]
        embeddings = model.get_input_embeddings()
        with torch.no_grad():
            self.embedded: Tensor = embeddings(torch.tensor([self.prompt.ids]))
            self.padding: Tensor = embeddings(torch.tensor(self.pad_token_id))
        self.whole = torch.ones(self.embedded.shape[:2], dtype=torch.bool)

    def along(self, inputs: Tensor) -> Tensor:
        return self.score(self.model, inputs, self.whole.expand(len(inputs), -1))

    @torch.no_grad()
    def after(self, removed: Sequence[Sequence[int]], removal: str) -> list[float]:
        """The score without each of `removed`, numbers of pieces."""
        present = torch.ones(len(removed), len(self.pieces))
        for line, numbers in enumerate(removed):
            present[line, list(numbers)] = 0
        kept = kept_tokens(self.pieces, present)
        if removal == "deleted":
            scores = self.score(self.model, self.embedded.expand(len(removed), -1, -1), kept)
        else:
            scores = self.along(torch.where(kept[:, :, None], self.embedded, self.padding))
        return [float(score) for score in scores]


def _by_piece(by_width: Tensor, pieces: Sequence[Piece]) -> tuple[float, ...]:
    tokens = by_width.detach().double().sum(dim=-1)[0]
    return tuple(float(tokens[piece.start : piece.end].sum()) for piece in pieces)


def occlusion(asked: Asked) -> tuple[float, ...]:
    found = attribute(
        asked.model, asked.score, asked.prompt.ids, asked.pieces, method="occlusion", pad_token_id=asked.pad_token_id
    )
    return found.values


def integrated_gradients(asked: Asked, missed: list[float]) -> tuple[float, ...]:
    found = attribute(
        asked.model,
        asked.score,
        asked.prompt.ids,
        asked.pieces,
        method="integrated-gradients",
        pad_token_id=asked.pad_token_id,
    )
    assert found.delta is not None
    missed.append(abs(found.delta))
    return found.values


def integrated_gradients_from_zero(asked: Asked, missed: list[float]) -> tuple[float, ...]:
    """As above, but the line begins where the embeddings of instruction and text are 0."""
    start = torch.where(kept_tokens(asked.pieces, torch.zeros(1, len(asked.pieces)))[:, :, None], asked.embedded, 0.0)
    inputs = asked.embedded.clone().requires_grad_()
    found = IntegratedGradients(asked.along).attribute(inputs, baselines=start, n_steps=STEPS, internal_batch_size=16)
    values = _by_piece(found, asked.pieces)
    with torch.no_grad():
        change = float(asked.along(asked.embedded)) - float(asked.along(start))
    missed.append(abs(sum(values) - change))
    return values


def input_x_gradient(asked: Asked) -> tuple[float, ...]:
    return _by_piece(InputXGradient(asked.along).attribute(asked.embedded.clone().requires_grad_()), asked.pieces)


def measure(model: Any, parts: Parts, rows: Sequence[Row], seed: int) -> tuple[Falls, dict[str, Any]]:
    """The falls of the score by text, the seconds each method took a text, and how far each integral was off."""
    rng = random.Random(seed)
    falls: Falls = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    missed: dict[str, list[float]] = {"integrated gradients": [], "integrated gradients from zero": []}
    methods: dict[str, Callable[[Asked], tuple[float, ...]]] = {
        "occlusion": occlusion,
        "integrated gradients": lambda asked: integrated_gradients(asked, missed["integrated gradients"]),
        "integrated gradients from zero": lambda asked: integrated_gradients_from_zero(
            asked, missed["integrated gradients from zero"]
        ),
        "input x gradient": input_x_gradient,
    }
    reporter = ConsoleReporter()
    reporter.stage("attributing and taking out", len(rows))
    for number_of_row, row in enumerate(rows, start=1):
        asked = Asked(model, parts, row)
        (whole,) = asked.after([[]], "deleted")
        orders = {}
        for name, method in methods.items():
            started = time.perf_counter()
            values = method(asked)
            seconds[name].append(time.perf_counter() - started)
            orders[name] = sorted(asked.own, key=lambda number: -values[number])
        for share in SHARES:
            count = max(1, round(share * len(asked.own)))
            drawn = [rng.sample(asked.own, count) for _ in range(DRAWS)]
            for removal in REMOVALS:
                both = [taken for order in orders.values() for taken in (order[:count], order[-count:])]
                after = asked.after([*both, *drawn], removal)
                for number, name in enumerate(orders):
                    falls[removal, name, "top", share].append(whole - after[2 * number])
                    falls[removal, name, "bottom", share].append(whole - after[2 * number + 1])
                falls[removal, "random", "random", share].append(whole - sum(after[len(both) :]) / DRAWS)
        reporter.advance(number_of_row)
    reporter.finish()
    return falls, {
        "seconds_per_text": {name: round(sum(took) / len(took), 3) for name, took in seconds.items()},
        "median_convergence_delta": {name: round(float(np.median(found)), 5) for name, found in missed.items()},
    }


def curves(falls: Falls, seed: int) -> list[dict[str, Any]]:
    """The mean falls with their intervals over texts; all curves on the same resamples."""
    rng = np.random.default_rng(seed)
    texts = len(next(iter(falls.values())))
    drawn = rng.integers(texts, size=(2000, texts))
    result = []
    for removal in REMOVALS:
        for name, order in dict.fromkeys((method, order) for _, method, order, _ in falls):
            points = {}
            for share in SHARES:
                values = np.array(falls[removal, name, order, share])
                points[str(share)] = percentile(values.mean(), values[drawn].mean(axis=1), confidence=0.95).to_json()
            result.append({"removal": removal, "method": name, "order": order, "fall": points})
    return result


def main(
    name: Annotated[str, typer.Argument(help="Name of the result.")],
    run: Annotated[Path, typer.Argument(help="A classification run.")],
    rows: int = 40,
    seed: int = 0,
) -> None:
    """Print the deletion curves and write them down."""
    torch.manual_seed(seed)
    parts = open_parts(open_run(run))
    model, _ = load_model(parts)
    held_out = [row for row in held_out_rows(parts).rows if row.text is not None]
    chosen = random.Random(seed).sample(held_out, min(rows, len(held_out)))
    falls, facts = measure(model, parts, chosen, seed)
    found = curves(falls, seed)
    typer.echo(f"fall of the log-odds, {len(chosen)} texts, share of the text's pieces taken out")
    typer.echo(f"{'':46}" + "".join(f"{share:>24.0%}" for share in SHARES))
    for curve in found:
        cells = (f"{p['value']:+.2f} [{p['low']:+.2f}, {p['high']:+.2f}]" for p in curve["fall"].values())
        line = f"{curve['removal']:8} {curve['method']:31}{curve['order']:7}"
        typer.echo(line + "".join(f"{cell:>24}" for cell in cells))
    typer.echo(str(facts))
    assert all(math.isfinite(p["value"]) for curve in found for p in curve["fall"].values())
    result = {"texts": len(chosen), "steps": STEPS, "random_draws": DRAWS, **facts, "curves": found}
    typer.echo(f"written to {write_result(f'explain_deletion_{name}', result)}")


if __name__ == "__main__":
    typer.run(main)
