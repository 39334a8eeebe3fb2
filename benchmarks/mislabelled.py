"""How many of the labels that were flipped on purpose `data.quality.mislabelled` finds among real ones.

    python -m benchmarks.mislabelled NAME RECIPE [section.key=value …]

5 % of the training rows of a recipe with labels, drawn with a seed, get another class. Precision and recall of what
is found are beside those of cleanlab's own default on the same predictions. Labels that were wrong before count as
found in error, so that precision is a lower bound. Written to benchmarks/results/mislabelled_NAME.json.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
import typer
from cleanlab.filter import find_label_issues

from benchmarks.record import write_result
from ift_peft.data.quality import mislabelled
from ift_peft.data.rows import read_rows
from ift_peft.recipe import load_recipe

SHARE = 0.05


def found_of(found: Iterable[int], flipped: set[int]) -> dict[str, float]:
    """Precision and recall of the numbers found."""
    numbers = set(found)
    hits = len(numbers & flipped)
    return {
        "found": len(numbers),
        "precision": round(hits / max(1, len(numbers)), 4),
        "recall": round(hits / len(flipped), 4),
    }


def measure(texts: list[str], labels: list[str], *, seed: int) -> dict[str, Any]:
    """What is found among `labels` with a share of them flipped, by us and by cleanlab's default."""
    names = sorted(set(labels))
    rng = random.Random(seed)
    flipped = set(rng.sample(range(len(labels)), round(SHARE * len(labels))))
    given = [
        rng.choice([name for name in names if name != label]) if number in flipped else label
        for number, label in enumerate(labels)
    ]
    verdict = mislabelled.judge(texts, given, texts, seed=seed)
    assert verdict is not None, "too few rows"
    judged, folds = mislabelled._folds(given, texts, seed)
    numbers = np.array([names.index(given[number]) for number in judged])
    probabilities = mislabelled._probabilities([texts[number] for number in judged], numbers, folds, seed)
    plain = [judged[at] for at in np.flatnonzero(find_label_issues(numbers, probabilities))]
    return {
        "rows": len(labels),
        "flipped": len(flipped),
        "agreement": round(verdict.agreement, 4),
        "judged": verdict.judged,
        "ours": found_of(verdict.rows, flipped),
        "cleanlab_default": found_of(plain, flipped),
    }


def main(
    name: Annotated[str, typer.Argument(help="Name of the result.")],
    recipe: Annotated[str, typer.Argument(help="A recipe with labels.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """Flip labels of a recipe's training rows and look for them."""
    rows, _ = read_rows(load_recipe(recipe, overrides or ()).data)
    result = measure([row.text or "" for row in rows], [row.label or "" for row in rows], seed=0)
    typer.echo(f"{result['rows']:,} rows, agreement {result['agreement']:.2f}")
    for who in ("ours", "cleanlab_default"):
        typer.echo(f"  {who:<17} precision {result[who]['precision']:.2f}  recall {result[who]['recall']:.2f}")
    typer.echo(f"written to {write_result(f'mislabelled_{name}', result)}")


if __name__ == "__main__":
    typer.run(main)
