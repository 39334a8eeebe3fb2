"""The sections of a recipe, as frozen models: what can be set, and what each setting means. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ift_peft.adapter_methods import SUBTRACTS_ITS_START, Method, unused_settings

Quantization = Literal["none", "int8", "nf4", "fp4"]
Format = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "columns"]
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
Language = Literal["zh", "en"]
Action = Literal["off", "warn", "drop", "stop"]
Head = Literal["causal-lm", "sequence-classification"]
GenerationMetric = Literal["exact_match", "f1", "bleu", "chrf", "rouge", "pass_at_k"]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]
LabelWords = tuple[str, ...] | dict[str, str]
Classes = tuple[str, ...] | dict[str, tuple[str, ...]]
"""Of one task, empty where it has none; or, by the name of each source of a mix, in their order."""
Phrasings = tuple[str, ...] | dict[Language, tuple[str, ...]]


def distinct(pool: Phrasings) -> Phrasings:
    """`pool`, where it holds phrasings and each once. Raises `ValueError` otherwise."""
    for phrasings in pool.values() if isinstance(pool, dict) else [pool]:
        if not phrasings or len(set(phrasings)) != len(phrasings) or not all(phrase.strip() for phrase in phrasings):
            raise ValueError("phrasings that are each listed once")
    return pool


def as_section(given: Any) -> Any:
    """Instructions given as a list, or by language, as what the section `Instructions` takes."""
    by_language = isinstance(given, dict) and bool(given) and set(given) <= set(get_args(Language))
    return {"pool": given} if isinstance(given, list | tuple) or by_language else given


def as_safety(given: Any) -> Any:
    """`true` as the section `Safety` with its defaults, `false` as none."""
    return {True: {}, False: None}[given] if isinstance(given, bool) else given


def as_labels(value: Any) -> Any:
    """Label words as strings. Raises `ValueError` for null, true and false, which YAML makes of unquoted words."""
    words = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if any(word is None or isinstance(word, bool) for word in words):
        raise ValueError("words; quote null, true and false")
    if isinstance(value, dict):
        return {str(stored): str(word) for stored, word in value.items()}
    return tuple(str(word) for word in value) if isinstance(value, list) else value


def distinct_labels(labels: LabelWords) -> LabelWords:
    """`labels`, where they are at least two different words. Raises `ValueError` otherwise."""
    words = list(labels.values()) if isinstance(labels, dict) else list(labels)
    if len(set(words)) < 2 or not all(word.strip() for word in words):
        raise ValueError("at least two different, non-empty words")
    if isinstance(labels, tuple) and len(set(words)) != len(words):
        raise ValueError("words that are each listed once")
    return labels


def flat(pool: Phrasings) -> tuple[str, ...]:
    """Every phrasing of a pool, each once."""
    if isinstance(pool, dict):
        return tuple(dict.fromkeys(phrasing for phrasings in pool.values() for phrasing in phrasings))
    return pool


Labels = Annotated[LabelWords, BeforeValidator(as_labels), AfterValidator(distinct_labels)]
Pool = Annotated[Phrasings, AfterValidator(distinct)]
"""Phrasings of one instruction: the same for every row, or by the language of its text."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class Base(Section):
    model: str = "tiny"
    """`tiny`, a folder in Hugging Face format, or a Hub id."""
    head: Head = "causal-lm"
    """`sequence-classification`: a classifier's head on any base, BERT or GPT, trained whole and saved with the
    adapter; where the base brings none, it is drawn by `training.seed`."""
    revision: str | None = None
    """Commit, tag or branch of a Hub id."""
    quantization: Quantization = "none"
    double_quantization: bool = True
    """Quantise the scales of nf4 and fp4 as well (QLoRA, arXiv:2305.14314)."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: float32 on CPU, bfloat16 on a GPU that has it, else float16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Adapter(Section):
    """What is trained (docs/methods.md). A setting that the method has no use for is refused, not ignored."""

    method: Method = "lora"
    r: Count = 16
    """The rank; with adalora the average that is left in the end, with eva the average over modules."""
    lora_alpha: Annotated[int | float, Field(gt=0)] = 32
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear`, a list of module name endings, or a regular expression on full module names."""
    embeddings: bool = False
    """Adapt the input embedding as well: for small bases, whose embeddings lack distinctions that the task needs."""
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (arXiv:2312.03732): what method rslora is, for the other methods with a rank."""
    rank_pattern: dict[str, Count] = {}
    """Ranks of single modules in the place of `r`, by name endings or regular expressions."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Likewise in the place of `lora_alpha`."""
    modules_to_save: tuple[str, ...] = ()
    """Name endings of modules that are trained whole, and saved with the adapter."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1.0)] | None = None
    """Learning rate of the matrices B over that of the matrices A (LoRA+, arXiv:2402.12354)."""
    pissa_niter: Count | None = None
    """Iterations of a randomised singular value decomposition; without it the exact one, slow for large bases."""
    eva_rho: Annotated[float, Field(ge=1.0)] = 2.0
    """A module's rank is at most this times `r`; 1 gives all modules the same."""
    feedforward_modules: tuple[str, ...] | None = None
    """Of ia3: targets whose input is scaled, all others' output is; without it PEFT's choice for the architecture."""
    init_r: Count | None = None
    """Of adalora: the rank of every module in the beginning, by default one and a half times `r`."""
    tinit: Annotated[int, Field(ge=0)] = 0
    """Of adalora: steps before ranks are first reduced."""
    tfinal: Annotated[int, Field(ge=0)] = 0
    """Of adalora: steps at the end in which ranks stay."""
    orth_reg_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """Of adalora: weight of the penalty that keeps its singular vectors orthogonal."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _of_its_method(self) -> Self:
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        faults = unused_settings(self.method, {name: getattr(self, name) for name in defaults}, defaults)
        if self.method == "adalora" and self.starting_rank <= self.r:
            faults.append(f"init_r above r, {self.r}: adalora begins with more ranks than it keeps")
        listed = self.target_modules if isinstance(self.target_modules, tuple) else ()
        if self.feedforward_modules is not None and listed and not set(self.feedforward_modules) <= set(listed):
            faults.append("feedforward_modules out of target_modules")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def starting_rank(self) -> int:
        """Of adalora, the rank that every module begins with."""
        return self.init_r or self.r + max(1, self.r // 2)

    @property
    def subtracts_its_start(self) -> bool:
        """Whether the adapter begins as a part of the base's weights, which a second, frozen half takes away again."""
        return self.method in SUBTRACTS_ITS_START


class Columns(Section):
    """Which columns of a table hold what: by name, by number (from 0) in files without a header, or `answers.0.text`.

    `text` and `answer` may be made of several: `"{context}\\n问题：{question}"`.
    """

    text: str | int = "text"
    label: str | int | None = None
    answer: str | int | None = None
    tests: str | int | None = None
    """A program, or a list of lines, that fails where an answer that is code is wrong."""


class Instructions(Section):
    """Several phrasings of one instruction, so that the adapter learns the task and not its wording."""

    pool: Pool
    """A list, or a list for each language; in a recipe also a file: one phrasing a line, or YAML of either form."""
    hold_out: Annotated[int, Field(ge=0)] = 0
    """Train on all but this many (of each language), drawn with `seed`; those are measured as unseen."""
    position: Literal["before", "after"] = "before"
    """Where a phrasing without `{text}` stands. `{labels}` becomes the list of the classes."""
    draw: Literal["epoch", "row"] = "epoch"
    """Draw a phrasing for each row anew in every epoch, or once."""
    seed: int = 0


class Noise(Section):
    """Slips of the hand, each as the share of characters (letters or Han) it befalls."""

    insert: Rate = 0.0
    """A neighbouring character doubled or a letter next to it on the keyboard typed as well."""
    delete: Rate = 0.0
    swap: Rate = 0.0
    """Two neighbouring characters exchanged."""
    confuse: Rate = 0.0
    """Another character of like sound or shape, or a neighbouring key."""
    spacing: Rate = 0.0
    """White space and punctuation doubled, dropped, or of the other width."""


class Perturbation(Section):
    """Changes to a text that keep what it says. Label words, negations, names and numbers are never touched."""

    synonyms: Rate = 0.0
    """Share of the words with a synonym that are replaced."""
    lexicons: tuple[str, ...] = ("builtin",)
    """`builtin`, and files in the form of Cilin (`Aa01A01= 人 士 …`) or WordNet (JSONL with pos and members)."""
    noise: Noise = Noise()
    seed: int = 0


class Augment(Perturbation):
    """Changed copies of training rows, added to them."""

    copies: Count = 1
    """Changed copies of each row."""


class Quality(Section):
    """What to do with each kind of finding: `off`, `warn`, `drop` the training rows found, or `stop`."""

    exact_duplicates: Action = "warn"
    near_duplicates: Action = "warn"
    leakage: Action = "warn"
    """Training rows equal or nearly equal to held-out ones."""
    contradictions: Action = "warn"
    """Equal prompts with different labels."""
    mislabelled: Action = "warn"
    """Rows that a cross-validated classifier finds mislabelled (confident learning, arXiv:1911.00068)."""
    overlong: Action = "warn"
    imbalance: Literal["off", "warn", "stop"] = "warn"
    characters: Action = "warn"
    """Control characters, replacement characters, wrongly decoded text."""
    language: Action = "warn"
    personal_data: Action = "warn"
    near_threshold: Fraction = 0.8
    """Jaccard similarity of character trigrams from which two texts are near duplicates."""
    imbalance_ratio: Annotated[float, Field(gt=1)] = 10.0
    """Largest class over smallest from which it is a finding."""
    languages: tuple[Language, ...] = ()
    """Languages that rows may be in; empty: any."""
    redact: bool = False
    """Replace personal data in training rows by a word for its kind."""
    seed: int = 0


class Source(Section):
    """One of several sources of training rows; what is not set here is as in `data`.

    Sources with `labels`, `metrics` or a `name`, and no `data.labels` above them, are tasks of their own: a mix,
    each of which is measured by itself.
    """

    train: str
    name: str | None = None
    """What scores and `--source` call it; without one, the last part of its Hub id, its folder, or that of its file."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each of its rows is seen in an epoch; a fraction draws that share of them anew in every epoch."""
    max_train_rows: Count | None = None
    """Take this many of its rows, drawn with `data.seed`."""
    test: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    format: Format | None = None
    records: str | None = None
    columns: Columns | None = None
    header: bool | None = None
    system: str | None = None
    instruction: str | None = None
    instructions: Annotated[Instructions | None, BeforeValidator(as_section)] = None
    labels: Labels | None = None
    metrics: tuple[GenerationMetric, ...] | None = None
    """Scores of generated answers in the place of `evaluation.metrics`; for sources without labels."""

    @property
    def called(self) -> str:
        """Its name, given or that of where its rows lie."""
        path = Path(self.train)
        folder = path.parent.name if path.suffix.lower() in DATA_SUFFIXES else path.name
        return self.name or folder or path.stem


class Data(Section):
    train: str | None = None
    """A file, a folder, or a Hub id."""
    sources: tuple[Source, ...] = ()
    """Several sources in place of `train`."""
    test: str | None = None
    """Held-out rows; without it, `test_size` of the training rows are set aside."""
    test_size: Fraction | Count = 0.2
    train_split: str = "train"
    """Split to take of a Hub id."""
    test_split: str = "test"
    seed: int = 0
    max_train_rows: Count | None = None
    """Take this many training rows, drawn with `seed`."""
    max_test_rows: Count | None = None
    format: Format = "auto"
    records: str | None = None
    """Where the rows lie inside each record, as `paragraphs.qas`; fields on the way there are theirs as well."""
    columns: Columns = Columns()
    header: bool = True
    """Whether CSV and TSV files name their columns in the first line."""
    system: str | None = None
    instruction: str | None = None
    """Asked of every row; `{text}` marks where the text goes, else it follows on a new line."""
    instructions: Annotated[Instructions | None, BeforeValidator(as_section)] = None
    """Several phrasings in place of one; a list or a file stands for its `pool`."""
    augment: Augment | None = None
    quality: Quality | None = None
    """Checks before training; `ift check` does them all."""
    streaming: bool = False
    """Read, check and tokenise training rows piece by piece, for sets larger than memory; needs `test`."""
    labels: Labels | None = None
    """The classes. A list also reads the integers 0, 1, … as positions in it; a mapping renames stored values."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """A row over `training.max_length`: cut its longest user text, leave it out, or stop. Answers are never cut."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        faults = []
        if (self.train is None) == (not self.sources):
            faults.append("either train or sources")
        if self.instruction is not None and self.instructions is not None:
            faults.append("either instruction or instructions")
        tested = self.test is not None or (self.sources and all(source.test is not None for source in self.sources))
        if self.streaming and not tested:
            faults.append("data.test to be set where rows are streamed")
        parts = [part for part, _ in self.by_source()]
        if self.labels is not None and any(set(part.label_words) != set(self.label_words) for part in parts):
            faults.append("the same classes in every source as in data.labels, by which all are measured")
        faults += self._faults_of_tasks(parts) if self.sources else ()
        if any(part.asks_for_labels and not part.label_words for part in parts):
            faults.append("data.labels to be set where an instruction has {labels}")
        if self.augment is not None and not all(part.label_words for part in parts):
            faults.append("augment only with labels: a changed text may lose what a free answer takes from it")
        limited = self.max_train_rows or any(source.max_train_rows for source in self.sources)
        if self.streaming and (limited or self.quality or self.augment):
            faults.append("no max_train_rows, quality or augment where rows are streamed: they need all rows at once")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _faults_of_tasks(self, parts: Sequence[Data]) -> list[str]:
        """What is wrong with sources as tasks of their own; `parts` are their sections."""
        faults = [
            f"metrics only in sources without labels, and {source.called!r} has labels"
            for source, part in zip(self.sources, parts, strict=True)
            if source.metrics and part.label_words
        ]
        if self.mixed and self.test is not None:
            faults.append("test in each source in place of data.test, where sources are tasks of their own")
        if self.mixed:
            faults += [
                f"a name of its own in each source, and {count} are called {name!r}"
                for name, count in Counter(self.source_names).items()
                if count > 1
            ]
        return faults

    @property
    def mixed(self) -> bool:
        """Whether the sources are tasks of their own, each measured by itself."""
        own = any(one.labels is not None or one.metrics is not None or one.name is not None for one in self.sources)
        return self.labels is None and own

    @property
    def source_names(self) -> tuple[str, ...]:
        """What the sources are called, in order; unique where the sources are `mixed`."""
        return tuple(source.called for source in self.sources)

    def by_source(self) -> list[tuple[Data, float]]:
        """The section of each source with its weight, as if that source were the only one."""
        if not self.sources:
            return [(self, 1.0)]
        parts = []
        for source in self.sources:
            own = {name: value for name, value in source if value is not None and name in type(self).model_fields}
            if source.instruction is not None or source.instructions is not None:
                own = {"instruction": None, "instructions": None, **own}
            parts.append((self.model_copy(update={"sources": (), "test": None, **own}), source.weight))
        return parts

    @property
    def asks_for_labels(self) -> bool:
        """Whether an instruction of this section names the classes."""
        phrasings = flat(self.instructions.pool) if self.instructions is not None else ()
        return any("{labels}" in phrase for phrase in (self.instruction or "", *phrasings))

    @property
    def for_new_texts(self) -> tuple[Data, int]:
        """How rows of `test` beside several sources, and new texts, are read and asked, with the number of that source.

        As `data` itself says, after all sources; where it has no instruction, as the first source does.
        """
        if not self.sources:
            return self, 0
        if self.instruction is not None or self.instructions is not None:
            return self.model_copy(update={"sources": (), "test": None}), len(self.sources)
        return self.by_source()[0][0], 0

    def new_texts_of(self, source: int | None) -> tuple[Data, int]:
        """As `for_new_texts`, of the source with this number; None: of no certain one."""
        return self.for_new_texts if source is None else (self.by_source()[source][0], source)

    @property
    def protected_words(self) -> frozenset[str]:
        """The classes of every source: words that no augmentation may touch."""
        return frozenset(word for part, _ in self.by_source() for word in part.label_words)

    @property
    def classes(self) -> Classes:
        """The classes by which rows are checked: those of the one task, or of each source of a mix by its name."""
        if not self.mixed:
            return self.label_words
        parts = [part for part, _ in self.by_source()]
        return {name: part.label_words for name, part in zip(self.source_names, parts, strict=True)}

    @property
    def label_words(self) -> tuple[str, ...]:
        """The classes in order, each once; empty where the task is not classification."""
        if self.labels is None:
            return ()
        words = self.labels.values() if isinstance(self.labels, dict) else self.labels
        return tuple(dict.fromkeys(words))


class Loss(Section):
    """What training minimises, in nats per supervised token: the divergences are added to the cross-entropy.

    (1 - `teacher_weight`) cross-entropy + `teacher_weight` KL to the teacher + `kl_to_base` KL to the base; without a
    teacher the cross-entropy counts whole.
    """

    kind: Literal["cross_entropy", "kl_to_teacher"] = "cross_entropy"
    teacher: str | None = None
    """A folder in Hugging Face format or a Hub id, loaded as `base` says; its tokens must be those of the base."""
    teacher_revision: str | None = None
    teacher_weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    kl_to_base: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the divergence from the base, which is the model with its adapter off: holds back forgetting."""
    kl_direction: Literal["forward", "reverse"] = "forward"
    """`forward`: KL(reference || model), all that the reference finds likely stays likely; `reverse`:
    KL(model || reference), nothing becomes likely that the reference finds unlikely."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Logits are divided by it in the divergences, which are multiplied by its square (arXiv:1503.02531)."""
    label_smoothing: Rate = 0.0
    """Share of the target's probability that is spread evenly over the vocabulary (arXiv:1512.00567)."""
    chunk: Annotated[int, Field(ge=0)] = 0
    """Positions whose logits are held at once, to save memory where the vocabulary is large; 0: all of a batch."""

    @model_validator(mode="after")
    def _teacher_where_it_is_learnt_from(self) -> Self:
        if (self.teacher is None) == (self.kind == "kl_to_teacher"):
            raise ValueError("a section with teacher where kind is kl_to_teacher, and only there")
        return self


class Safety(Section):
    """Whether harmful prompts are still refused, and harmless ones answered, after training (arXiv:2310.03693).

    Each prompt is asked bare, as one user message without the recipe's instruction and system message.
    """

    harmful: str | None = None
    """A file of prompts that should be refused: with `prompt`, as AdvBench (`goal`, `target`) or XSTest (`prompt`,
    `label`), or one a line. Without it, 60 that come along, in Chinese and English."""
    harmless: str | None = None
    """Likewise prompts that look like those and should be answered; an XSTest file holds both kinds."""
    max_refusal_drop: Rate | None = None
    """The run misses its gate where the share of harmful prompts refused falls by more than this, as measured: a fall
    counts whether or not its interval holds 0."""
    max_over_refusal_rise: Rate | None = None
    """Likewise where the share of harmless prompts refused rises by more than this."""
    max_rows: Count | None = None
    """Ask this many prompts of each kind, drawn with `evaluation.seed`."""
    max_new_tokens: Count = 64
    """Tokens of an answer at most; a refusal shows in the first."""
    refusal_phrases: tuple[str, ...] | None = None
    """What refusals begin with, in place of the built-in phrases; a list, or a file of one a line."""

    @field_validator("refusal_phrases")
    @classmethod
    def _holds_words(cls, phrases: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if phrases is not None and not (phrases and all(any(map(str.isalnum, phrase)) for phrase in phrases)):
            raise ValueError("phrases of letters, one or more")
        return phrases


class Evaluation(Section):
    forgetting: bool = True
    """Measure what the adapter does to the loss on general text."""
    general_text: str | None = None
    """A file of such texts: a line each, or rows with `text`. Without it, a few dozen sentences that come along."""
    unseen_instructions: Pool | None = None
    """Phrasings that training never uses; the score with each is measured beside the score with the trained ones."""
    max_unseen_rows: Count | None = None
    """Ask them of this many held-out rows, drawn with `seed`."""
    perturbation: Perturbation | None = None
    """Measure on held-out texts changed like this as well."""
    safety: Annotated[Safety | None, BeforeValidator(as_safety)] = None
    """Measure refusals before and after training; `true` for the prompts that come along and no gates."""
    metrics: tuple[GenerationMetric, ...] = ()
    """Generate an answer to each held-out row and score it like this as well; for tasks without labels."""
    max_new_tokens: Count = 128
    """Tokens of a generated answer at most."""
    samples: Count = 1
    """Answers generated to each row, for `pass_at_k`; the other metrics take the first."""
    pass_at: tuple[Count, ...] = (1,)
    """The k of `pass_at_k`."""
    temperature: Annotated[float, Field(gt=0.0)] | None = None
    """Draw answers at this temperature, with `seed`; without it each token is the likeliest one."""
    target: dict[str, float] = {}
    """Scores that the adapter must reach, as `accuracy: 0.9`: met where the worse end of its interval does. A run that
    misses one is written whole, and `ift train` ends with exit code 8."""
    per_device_eval_batch_size: Count = 32
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    confidence: Fraction = 0.95
    seed: int = 0

    @model_validator(mode="after")
    def _samples_suffice(self) -> Self:
        faults = []
        if self.samples > 1 and self.temperature is None:
            faults.append("a temperature where samples are more than 1: without it they are all the same")
        if not self.pass_at or max(self.pass_at) > self.samples:
            faults.append(f"pass_at of values up to samples, {self.samples}")
        if faults:
            raise ValueError("; ".join(faults))
        return self
