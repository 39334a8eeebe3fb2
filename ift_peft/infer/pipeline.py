"""A trained pipeline that answers: each stage asked with the answers of those before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ift_peft.data.fields import RecordFault, filled_with
from ift_peft.data.render import Renderer
from ift_peft.errors import DataError, raise_all
from ift_peft.infer.ensemble import Member, open_members
from ift_peft.infer.generation import generate_all, room
from ift_peft.infer.load import Parts, Question, open_parts
from ift_peft.infer.predict import Answer, answer_all, generate
from ift_peft.run_dir import RunDir, open_run
from ift_peft.stages import AT_ONCE, HOLE, fields_of, holes

Values = dict[str, str]


@dataclass(frozen=True)
class Stage:
    """A run that answers one part. `text` is the template of what it is asked, of fields and of other stages."""

    name: str
    member: Member
    text: str

    @property
    def parts(self) -> Parts:
        return self.member.parts

    @property
    def max_new_tokens(self) -> int:
        return self.parts.recipe.evaluation.max_new_tokens


@dataclass(frozen=True)
class Chain:
    """The stages of a pipeline over one base, in an order in which they can run."""

    stages: tuple[Stage, ...]
    at_once: Stage | None
    document: str

    @property
    def fields(self) -> tuple[str, ...]:
        """What a request has to have."""
        return fields_of((stage.text for stage in self.stages), (stage.name for stage in self.stages))

    def request(self, given: str | Mapping[str, Any], *, where: str = "") -> Values:
        """A request as its fields: of a bare text, the only one. Raises `DataError` for what is missing or no text."""
        fields = self.fields
        place = f" at {where}" if where else ""
        if isinstance(given, str):
            if len(fields) > 1:
                raise DataError(
                    expected=f"a request of {', '.join(fields)}",
                    found=f"one text{place}",
                    fix='give them by --input FILE, a JSON object a line: {"' + fields[0] + '": …}',
                )
            given = {fields[0]: given}
        values, faults = Values(), []
        for name in fields:
            try:
                values[name] = filled_with(dict(given), name)
            except RecordFault as fault:
                expected, found, fix = fault.args
                faults.append(DataError(expected=expected, found=f"{found}{place}", fix=fix))
        raise_all(faults)
        if not any(value.strip() for value in values.values()):
            raise DataError(
                expected=f"text under {' or '.join(map(repr, fields))}", found=f"nothing{place}", fix="fill it in"
            )
        return values


def open_chain(run: RunDir, *, at_once: bool = False) -> tuple[Chain, list[str]]:
    """The pipeline of a finished run with its base loaded once, and notes on loading.

    Raises like `open_parts` where a stage's base, template or tokens are not those of its training.
    """
    pipeline = run.recipe().pipeline
    assert pipeline is not None
    runs = {name: open_run(part.path) for name, part in run.parts.items()}
    if not at_once:
        runs.pop(AT_ONCE, None)
    members, notes = open_members([open_parts(own) for own in runs.values()])
    stages = {
        name: Stage(name, member, str(member.parts.recipe.data.columns.text))
        for name, member in zip(runs, members, strict=True)
    }
    whole = stages.pop(AT_ONCE, None)
    return Chain(tuple(stages.values()), whole, pipeline.document), notes


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its names in braces replaced; one without braces is itself a name."""
    if not HOLE.search(template):
        return values[template]
    return HOLE.sub(lambda hole: values[hole[1]], template)


def answer_stage(
    stage: Stage,
    values: Sequence[Values],
    *,
    progress: Callable[[int, int], None] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[Answer]:
    """The stage's answer to each set of values, in order; an empty one where nothing was put into its prompt.

    Answers are generated in batches, or with `on_text` one by one, which receives them as they come.
    """
    model, parts = stage.member.activate(), stage.parts
    asked = [number for number, own in enumerate(values) if any(own[hole].strip() for hole in holes(stage.text))]
    questions = [parts.ask(fill(stage.text, values[number])) for number in asked]
    if parts.labels or on_text is not None:
        found = list(answer_all(model, parts, questions, max_new_tokens=stage.max_new_tokens, on_text=on_text))
    else:
        found = _generate(model, stage, questions, progress)
    answers = dict(zip(asked, found, strict=True))
    return [answers.get(number, Answer("", None, False)) for number in range(len(values))]


def _generate(
    model: Any, stage: Stage, questions: Sequence[Question], progress: Callable[[int, int], None] | None
) -> list[Answer]:
    """Batches of those with room for a whole answer; the others singly, up to the base's last position."""
    parts = stage.parts
    assert isinstance(parts.renderer, Renderer)
    fitted = [parts.fit_prompt(question) for question in questions]
    lengths = map(len, parts.renderer.prompts([prompt for prompt, _ in fitted])) if fitted else ()
    left = [room(model, length) for length in lengths]
    whole = [number for number, tokens in enumerate(left) if tokens is None or tokens >= stage.max_new_tokens]
    texts = generate_all(
        model,
        parts.renderer,
        [fitted[number][0] for number in whole],
        max_new_tokens=stage.max_new_tokens,
        batch_size=parts.recipe.evaluation.per_device_eval_batch_size,
        progress=progress,
    )
    found = {number: text for number, (text,) in zip(whole, texts, strict=True)}
    for number, (prompt, _) in enumerate(fitted):
        if number not in found:
            found[number] = generate(model, parts, prompt, max_new_tokens=stage.max_new_tokens)
    return [Answer(found[number], None, truncated) for number, (_, truncated) in enumerate(fitted)]


def walk(
    chain: Chain,
    requests: Sequence[Values],
    *,
    on_stage: Callable[[Stage], Callable[[str], None] | None] | None = None,
    progress: Callable[[Stage, int, int], None] | None = None,
) -> list[tuple[Values, dict[str, Answer]]]:
    """Each request with the answer of every stage in it, and these answers by stage; all requests stage by stage.

    `on_stage` is called before each stage, and may return what receives its text as it comes.
    """
    values = [dict(request) for request in requests]
    answers: list[dict[str, Answer]] = [{} for _ in requests]
    for stage in chain.stages:
        on_text = on_stage(stage) if on_stage is not None else None
        told = None if progress is None else (lambda done, total, stage=stage: progress(stage, done, total))
        for number, answer in enumerate(answer_stage(stage, values, progress=told, on_text=on_text)):
            values[number][stage.name] = answer.text
            answers[number][stage.name] = answer
    return list(zip(values, answers, strict=True))
