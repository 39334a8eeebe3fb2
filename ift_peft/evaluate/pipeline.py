"""A pipeline on held-out requests: its documents against those of one adapter, each stage with and without errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ift_peft.data.fields import Record, RecordFault, filled_with, unfold
from ift_peft.data.formats import to_row
from ift_peft.data.rows import raise_faults, sampled
from ift_peft.data.sources import read_source
from ift_peft.errors import DataError, IftPeftError
from ift_peft.evaluate import metrics
from ift_peft.evaluate.measure import resampling
from ift_peft.evaluate.metrics import Resampling
from ift_peft.evaluate.text_metrics import text_scores
from ift_peft.infer.pipeline import Chain, Stage, Values, answer_stage, fill, open_chain
from ift_peft.infer.predict import Answer
from ift_peft.recipe import Recipe, stage_recipes
from ift_peft.reporter import Reporter
from ift_peft.run_dir import RunDir
from ift_peft.stages import AT_ONCE, fields_of, holes

PREDICTIONS = "predictions.jsonl"


def held_out_requests(recipe: Recipe) -> list[tuple[Values, str]]:
    """The held-out requests of a pipeline, each with the answers wanted of its stages, and where it stands.

    Raises `Faults` naming every record that lacks one of them.
    """
    assert recipe.pipeline is not None and recipe.data.test is not None
    data, faults = recipe.data, list[IftPeftError]()
    recipes, document = stage_recipes(recipe), recipe.pipeline.document
    all_of_them = list(recipes.values())
    recipes.pop(AT_ONCE, None)
    fields = fields_of((str(own.data.columns.text) for own in recipes.values()), recipes)
    taken = {hole for own in all_of_them for hole in holes(str(own.data.columns.text))} | set(holes(document))
    records: Sequence[Record] = read_source(str(data.test), faults, split=data.test_split, header=data.header)
    if data.records is not None:
        records = list(unfold(records, data.records, faults))
    found = []
    for record in records:
        try:
            found.append((_wanted(record, fields, recipes, taken), record.where))
        except RecordFault as fault:
            expected, what, fix = fault.args
            faults.append(DataError(expected=expected, found=f"{what} at {record.where}", fix=fix))
    raise_faults(faults)
    return sampled(found, data.max_test_rows, data.seed)


def _wanted(record: Record, fields: Sequence[str], recipes: dict[str, Recipe], taken: set[str]) -> Values:
    """Request and wanted answers of one record. Raises `RecordFault`.

    What other stages are trained to read under a stage's name must be what that stage answers.
    """
    values = {name: filled_with(record.values, name) for name in fields}
    if not any(value.strip() for value in values.values()):
        raise RecordFault(f"text under {' or '.join(map(repr, fields))}", "empty cells", "fill or remove the row")
    for name, own in recipes.items():
        values[name] = to_row(record, own.data).answer
        if name in taken and filled_with(record.values, name) != values[name]:
            raise RecordFault(
                f"in the column {name!r}, which other stages are trained on, what stage {name} answers",
                f"{filled_with(record.values, name)!r:.60}, and the answer {values[name]!r:.60}",
                "write the answers into that column, or call the stage otherwise",
            )
    return values


def evaluate_pipeline(run: RunDir, *, reporter: Reporter, keep: bool = False) -> dict[str, Any]:
    """The scores of a pipeline's documents and of its stages; with `keep`, what was written goes into its folder.

    `document` compares the pipeline with the adapter asked for all at once. `stages` has for each stage its answers
    to the wanted answers of earlier stages (`given`), to those that the stages gave (`piped`), and the change, paired.
    """
    recipe = run.recipe()
    assert recipe.pipeline is not None
    wanted = held_out_requests(recipe)
    chain, notes = open_chain(run, at_once=True)
    for note in notes:
        reporter.note(note)
    given = [values for values, _ in wanted]
    requests = [{name: values[name] for name in chain.fields} for values in given]

    def stage(told: str, own: Stage, values: Sequence[Values]) -> list[Answer]:
        reporter.stage(told, len(values))
        answers = answer_stage(own, values, progress=lambda done, total: reporter.advance(done))
        reporter.finish()
        return answers

    piped = [dict(values) for values in requests]
    section, scores = resampling(recipe.evaluation), dict[str, Any]()
    for own in chain.stages:
        answers = stage(f"writing {own.name}", own, piped)
        first = not set(fields_of([own.text], chain.fields))  # nothing that another stage wrote goes into it
        right = answers if first else stage(f"writing {own.name} from the wanted answers", own, given)
        for values, answer in zip(piped, answers, strict=True):
            values[own.name] = answer.text
        own_metrics = [name for name in own.parts.recipe.evaluation.metrics if name != "pass_at_k"]
        names = own_metrics or recipe.pipeline.metrics
        texts = [[one.text for one in side] for side in (right, answers)]
        found = _compared(own, [values[own.name] for values in given], *texts, names=names, section=section)
        scores[own.name] = {
            "given": found["base"],
            "piped": found["adapter"],
            "change": found["change"],
            "truncated": sum(answer.truncated for answer in answers),
            "empty": sum(not answer.text.strip() for answer in answers),
        }
    whole = None if chain.at_once is None else stage("writing all at once", chain.at_once, requests)
    documents = [fill(chain.document, values) for values in piped]
    if keep:
        run.write_lines(PREDICTIONS, _lines(chain, wanted, piped, documents, whole))
    return {
        "rows": len(wanted),
        "document": _documents(chain, given, documents, whole, names=recipe.pipeline.metrics, section=section),
        "stages": scores,
        "intervals": section.describe(),
    }


def _compared(
    stage: Stage,
    wanted: Sequence[str],
    right: Sequence[str],
    piped: Sequence[str],
    *,
    names: Sequence[str],
    section: Resampling,
) -> dict[str, Any]:
    labels = stage.parts.labels
    if not labels:
        found = text_scores(wanted, right, piped, names=names, resampling=section)
        return {
            name: metrics.to_json(one)
            for name, one in (("base", found.base), ("adapter", found.adapter), ("change", found.change))
        }
    numbers = {label: number for number, label in enumerate(labels)}
    truth, before, after = (  # an answer to an empty prompt is no label, and is counted as another one than the truth
        [numbers.get(text, -1) for text in texts] for texts in (wanted, right, piped)
    )
    hits = [
        [(value if value >= 0 else (true + 1) % len(labels)) for value, true in zip(side, truth, strict=True)]
        for side in (before, after)
    ]
    change = metrics.classification_change(truth, hits[0], hits[1], len(labels), section)
    base, adapter = (
        metrics.classification_metrics(metrics.confusion(truth, side, len(labels)), section) for side in hits
    )
    return {"base": metrics.to_json(base), "adapter": metrics.to_json(adapter), "change": metrics.to_json(change)}


def _documents(
    chain: Chain,
    given: Sequence[Values],
    documents: Sequence[str],
    whole: Sequence[Answer] | None,
    *,
    names: Sequence[str],
    section: Resampling,
) -> dict[str, Any]:
    references = [fill(chain.document, values) for values in given]
    single = documents if whole is None else [answer.text for answer in whole]
    found = text_scores(references, single, documents, names=names, resampling=section)
    told: dict[str, Any] = {"pipeline": metrics.to_json(found.adapter)}
    if whole is not None:
        told = {AT_ONCE: metrics.to_json(found.base), **told, "change": metrics.to_json(found.change)}
        change = told["change"][next(iter(told["change"]))]
        told["verdict"] = _verdict(next(iter(told["change"])), change)
    return {**told, "signatures": found.signatures}


def _verdict(metric: str, change: dict[str, float]) -> str:
    told = f"{metric} {change['value']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
    if change["low"] > 0:
        return f"the stages write better documents than one adapter asked for all at once: {told}"
    if change["high"] < 0:
        return f"one adapter asked for all at once writes better documents than the stages: {told}"
    return f"not shown to differ from one adapter asked for all at once: {told}, an interval that holds 0"


def _lines(
    chain: Chain,
    wanted: Sequence[tuple[Values, str]],
    piped: Sequence[Values],
    documents: Sequence[str],
    whole: Sequence[Answer] | None,
) -> list[dict[str, Any]]:
    lines = []
    for number, ((values, where), own, document) in enumerate(zip(wanted, piped, documents, strict=True)):
        lines.append(
            {
                "where": where,
                "request": {name: own[name] for name in chain.fields},
                "wanted": {stage.name: values[stage.name] for stage in chain.stages},
                "pipeline": {stage.name: own[stage.name] for stage in chain.stages},
                "document": document,
                **({} if whole is None else {AT_ONCE: whole[number].text}),
            }
        )
    return lines
