"""The text that `tiny` was pretrained on: which sets, under which licences, and how each becomes documents.

Only openly licensed sets are read (MIT, Apache-2.0, CC BY, CC BY-SA, CDLA, ODC-BY); review sets are left out so that
sentiment is something an adapter has to learn. Folders are looked up by name below one root directory.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ift_peft.errors import DataError

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"


def chat(*turns: str) -> str:
    """Alternating user and assistant turns in tiny's chat format, first turn the user's."""
    roles = (USER, ASSISTANT)
    return "".join(f"{roles[i % 2]}{turn.strip()}{END}" for i, turn in enumerate(turns))


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _paragraphs(text: str, *, limit: int = 1200) -> Iterator[str]:
    """Pieces of up to about `limit` characters, cut at blank lines."""
    piece = ""
    for paragraph in re.split(r"\n\s*\n", text):
        if piece and len(piece) + len(paragraph) > limit:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}".strip()
    if piece:
        yield piece


def _chatlm(root: Path) -> Iterator[str]:
    for name in ("train.jsonl", "valid.jsonl"):
        for row in _jsonl(root / name):
            yield chat(row["prompt"], row["response"])


def _ruozhiba(root: Path) -> Iterator[str]:
    for row in json.loads((root / "ruozhiba_qa2449_gpt4o.json").read_text("utf-8")):
        yield chat(row["instruction"], row["output"])


def _rasbt(root: Path) -> Iterator[str]:
    for row in json.loads((root / "instruction-data.json").read_text("utf-8")):
        yield chat(f"{row['instruction']}\n{row['input']}", row["output"])


def _self_instruct(root: Path) -> Iterator[str]:
    for row in _jsonl(root / "seed_tasks.jsonl"):
        for case in row["instances"]:
            yield chat(f"{row['instruction']}\n{case['input']}", case["output"])


def _dialogue(root: Path) -> Iterator[str]:
    with (root / "toy_train.txt").open(encoding="utf-8") as lines:
        for line in lines:
            turns = [re.sub(r"(?<![a-zA-Z]) | (?![a-zA-Z])", "", turn) for turn in line.strip().split("\t")]
            yield chat(*turns[: len(turns) // 2 * 2])


_INDUCTION = {
    "antonyms": "Write the opposite of this word.",
    "synonyms": "Write a word that means the same.",
    "negation": "Negate this sentence.",
    "active_to_passive": "Rewrite this sentence in the passive voice.",
    "singular_to_plural": "Write the plural.",
    "first_word_letter": "What is the first letter of this word?",
    "larger_animal": "Which animal is larger?",
    "common_concept": "What do these have in common?",
    "informal_to_formal": "Rewrite this in formal language.",
    "sentence_similarity": "How similar are these two sentences?",
}


def _induction(root: Path) -> Iterator[str]:
    for name, instruction in _INDUCTION.items():
        examples = json.loads((root / f"induce__{name}.json").read_text("utf-8"))["examples"]
        for example in examples.values():
            if isinstance(example.get("input"), str) and isinstance(example.get("output"), str):
                yield chat(f"{instruction}\n{example['input']}", example["output"])


def _translation(root: Path) -> Iterator[str]:
    rng = random.Random(0)
    with (root / "train.tsv").open(encoding="utf-8") as lines:
        for line in lines:
            english, chinese = line.rstrip("\n").split("\t")[:2]
            forms = (
                chat(f"把这句话翻译成英文：{chinese}", english),
                chat(f"Translate into Chinese: {english}", chinese),
                f"{english} {chinese}",
                f"{chinese} {english}",
            )
            yield rng.choice(forms)


def _wordnet(root: Path) -> Iterator[str]:
    """Words of one meaning: every adjective and adverb, a sample of the nouns and verbs."""
    rng = random.Random(0)
    for row in _jsonl(root / "synonyms.jsonl"):
        if row["pos"] not in ("a", "s", "r") and rng.random() > 0.25:
            continue
        first, *others = rng.sample(row["members"], len(row["members"]))
        form = f"Which word means the same as {first}?"
        yield rng.choice((f"{first} means {', '.join(others)}.", chat(form, ", ".join(others))))


def _cmrc(root: Path) -> Iterator[str]:
    """Questions on the trial part; of the dev part only the passages, so that its questions stay unseen."""
    for name, with_questions in (("cmrc2018_trial.json", True), ("cmrc2018_dev.json", False)):
        for article in json.loads((root / name).read_text("utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                yield paragraph["context"]
                for qa in paragraph["qas"] if with_questions else ():
                    answer = qa["answers"][0]["text"]
                    start = max(0, paragraph["context"].find(answer) - 60)
                    yield chat(f"{paragraph['context'][start : start + 160]}\n{qa['question']}", answer)


def _docs(root: Path) -> Iterator[str]:
    for row in _jsonl(root / "docs.jsonl"):
        yield from _paragraphs(row["text"])


def _wikitext(root: Path) -> Iterator[str]:
    fixes = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" ,", ","), (" .", "."), (" 's", "'s"), (" ;", ";"))
    text = (root / "valid.txt").read_text("utf-8")
    for wrong, right in fixes:
        text = text.replace(wrong, right)
    yield from (line.strip() for line in text.splitlines() if len(line) > 80)


def _stories(root: Path) -> Iterator[str]:
    yield from json.loads((root / "tinystories_1000.json").read_text("utf-8"))


def _headlines(root: Path) -> Iterator[str]:
    """Titles alone, a few to a document; the topic labels are not read."""
    with (root / "train.tsv").open(encoding="utf-8") as lines:
        titles = [line.split("\t")[0].strip() for line in lines]
    random.Random(0).shuffle(titles)
    for start in range(0, len(titles), 5):
        yield "\n".join(titles[start : start + 5])


def _web(root: Path) -> Iterator[str]:
    for row in _jsonl(root / "c4_demo.jsonl"):
        yield from _paragraphs(row["text"].replace("\n", "\n\n"))


def _poems(root: Path) -> Iterator[str]:
    with (root / "train.tsv").open(encoding="utf-8") as lines:
        yield from (line.strip().replace("\t", "\n") for line in lines)


@dataclass(frozen=True)
class Source:
    """One set: its folder, licence, reader, and how often an epoch passes over it (a fraction takes a sample)."""

    folder: str
    licence: str
    kind: str
    read: Callable[[Path], Iterator[str]]
    passes: float


SOURCES = (
    Source("chatlm_zh_sft_sample", "Apache-2.0", "Chinese instructions and answers", _chatlm, 1.5),
    Source("ruozhiba_gpt4", "Apache-2.0", "Chinese questions and answers", _ruozhiba, 1.0),
    Source("cdial_toy", "MIT", "Chinese dialogue", _dialogue, 1.5),
    Source("cmrc2018", "CC BY-SA 4.0", "Chinese prose and questions on it", _cmrc, 1.0),
    Source("tnews", "Apache-2.0", "Chinese headlines", _headlines, 1.0),
    Source("corpus_d2l_zh", "Apache-2.0", "Chinese textbook", _docs, 0.3),
    Source("corpus_react_docs_zh", "CC BY 4.0", "Chinese documentation", _docs, 0.3),
    Source("corpus_vue_docs_zh", "CC BY 4.0", "Chinese documentation", _docs, 0.3),
    Source("corpus_chinese_poetry", "MIT", "Chinese verse", _poems, 0.05),
    Source("tatoeba_en_zh", "CC BY 2.0 FR", "English-Chinese sentence pairs", _translation, 2.0),
    Source("rasbt_instruction", "Apache-2.0", "English instructions and answers", _rasbt, 2.0),
    Source("self_instruct_seed", "Apache-2.0", "English instructions and answers", _self_instruct, 2.0),
    Source(
        "instruction_induction",
        "Apache-2.0",
        "English word and sentence tasks (not its sentiment task)",
        _induction,
        1.0,
    ),
    Source("english_wordnet_synonyms", "CC BY 4.0", "English synonyms", _wordnet, 1.0),
    Source("corpus_tinystories_1000", "CDLA-Sharing-1.0", "English stories", _stories, 1.5),
    Source("corpus_wikitext2_validtest", "CC BY-SA 3.0", "English prose (validation part)", _wikitext, 1.5),
    Source("llamafactory_demo", "ODC-BY (its C4 sample alone)", "English web text", _web, 2.0),
)


def read_documents(root: Path) -> dict[str, list[str]]:
    """Every source's documents, by folder name.

    Raises `DataError` naming every folder of `SOURCES` that is not below `root`.
    """
    missing = [source.folder for source in SOURCES if not (root / source.folder).is_dir()]
    if missing:
        raise DataError(
            expected=f"one folder for each source below {root}",
            found=f"none for {', '.join(missing)}",
            fix="download the sets named in the model card and pass their parent folder as --corpora",
        )
    documents = {}
    for source in SOURCES:
        texts = (text.strip() for text in source.read(root / source.folder))
        documents[source.folder] = [text for text in texts if text]
    return documents
