"""TF-IDF with logistic regression on the rows of a recipe: the line that an adapter has to beat.

    python -m benchmarks.tfidf_baseline NAME RECIPE [section.key=value …]

Word and character n-grams and the regularisation are chosen by cross-validation on the training rows; the test rows
are scored once. The result is written to benchmarks/results/tfidf_NAME.json.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline

from benchmarks.record import write_result
from ift_peft.data.row import Row
from ift_peft.data.rows import read_rows
from ift_peft.evaluate.intervals import wilson
from ift_peft.recipe import load_recipe

GRID = {
    "tfidf__analyzer": ["char", "char_wb"],
    "tfidf__ngram_range": [(1, 2), (1, 3), (1, 4)],
    "classifier__C": [1, 10],
}
WORD_GRID = {"tfidf__analyzer": ["word"], "tfidf__ngram_range": [(1, 1), (1, 2)], "classifier__C": [1, 10]}


def texts(rows: list[Row]) -> list[str]:
    return [row.text or row.prompt[-1]["content"] for row in rows]


def measure(train: list[Row], test: list[Row]) -> dict[str, Any]:
    """Cross-validated choice of features on `train`, accuracy on `test` with its Wilson interval."""
    pipeline = Pipeline(
        [("tfidf", TfidfVectorizer(sublinear_tf=True)), ("classifier", LogisticRegression(max_iter=2000))]
    )
    search = GridSearchCV(pipeline, [GRID, WORD_GRID], cv=3, scoring="accuracy")
    search.fit(texts(train), [row.label for row in train])
    predicted = search.predict(texts(test))
    hits = sum(guess == row.label for guess, row in zip(predicted, test, strict=True))
    accuracy = wilson(hits, len(test), confidence=0.95)
    settings = {name: str(value) for name, value in search.best_params_.items()}
    return {"train_rows": len(train), "test_rows": len(test), "accuracy": accuracy.to_json(), "settings": settings}


def main(
    name: Annotated[str, typer.Argument(help="Name of the result.")],
    recipe: Annotated[str, typer.Argument(help="A recipe with labels.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
) -> None:
    """Measure the baseline on a recipe's rows."""
    train, test = read_rows(load_recipe(recipe, overrides or ()).data)
    result = measure(train, test)
    accuracy = result["accuracy"]
    typer.echo(
        f"TF-IDF + logistic regression, {len(train):,} rows -> {len(test):,} test rows: "
        f"accuracy {accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
    )
    typer.echo(f"written to {write_result(f'tfidf_{name}', result)}")


if __name__ == "__main__":
    typer.run(main)
