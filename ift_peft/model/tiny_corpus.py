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


def _join_characters(text: str) -> str:
    """The text without the spaces that were put between its characters."""
    return re.sub(r"(?<![a-zA-Z]) | (?![a-zA-Z])", "", text)


def _dialogue(root: Path) -> Iterator[str]:
    with (root / "toy_train.txt").open(encoding="utf-8") as lines:
        for line in lines:
            turns = [_join_characters(turn) for turn in line.strip().split("\t")]
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


def _is_translation(root: Path) -> Iterator[str]:
    """Sentence pairs, half of them mismatched at like lengths: does one translate the other?"""
    rng = random.Random(1)
    with (root / "train.tsv").open(encoding="utf-8") as lines:
        pairs = sorted((line.rstrip("\n").split("\t")[:2] for line in lines), key=lambda pair: len(pair[0]))
    for index, (english, chinese) in enumerate(pairs):
        right = rng.random() < 0.5
        other = pairs[min(len(pairs) - 1, max(0, index + rng.choice((-40, -20, -9, 9, 20, 40))))][1]
        shown = chinese if right else other
        if not right and other == chinese:
            continue
        if rng.random() < 0.5:
            yield chat(f"这两句话意思相同吗？\n{english}\n{shown}", "相同" if right else "不同")
        else:
            yield chat(f"Do these mean the same?\n{shown}\n{english}", "yes" if right else "no")


def _is_reply(root: Path) -> Iterator[str]:
    """Dialogue turns, half of them with a reply from elsewhere: does the reply fit?"""
    rng = random.Random(2)
    with (root / "toy_train.txt").open(encoding="utf-8") as lines:
        pairs = [[_join_characters(turn) for turn in line.strip().split("\t")[:2]] for line in lines if "\t" in line]
    for turn, reply in pairs:
        fits = rng.random() < 0.5
        shown = reply if fits else rng.choice(pairs)[1]
        yield chat(f"下面的回答合适吗？\n问：{turn}\n答：{shown}", "合适" if fits else "不合适")


def _is_synonym(root: Path) -> Iterator[str]:
    """Two adjectives or adverbs of one meaning, or of two: do they mean the same?"""
    rng = random.Random(3)
    groups = [row["members"] for row in _jsonl(root / "synonyms.jsonl") if row["pos"] in ("a", "s", "r")]
    for group in groups:
        first, second = rng.sample(group, 2)
        same = rng.random() < 0.5
        other = second if same else rng.choice(rng.choice(groups))
        yield chat(f"Do these words mean the same: {first}, {other}?", "yes" if same else "no")


def _genre(root: Path) -> Iterator[str]:
    """Short pieces of four other sources: what kind of text is this? The kind is known from where it was taken."""
    rng = random.Random(4)
    sources = root.parent
    with (sources / "tnews" / "train.tsv").open(encoding="utf-8") as lines:
        headlines = [line.split("\t")[0].strip() for line in lines]
    dialogue = [turn for text in _dialogue(sources / "cdial_toy") for turn in re.findall(r"<\|user\|>(.+?)<", text)]
    prose = [text for text in _cmrc(root) if not text.startswith(USER)]
    encyclopedia = [sentence for text in prose for sentence in text.split("。") if 8 < len(sentence) < 60]
    stories = [
        sentence for text in _stories(sources / "corpus_tinystories_1000") for sentence in text.split("\n") if sentence
    ]
    news = [line for line in _wikitext(sources / "corpus_wikitext2_validtest") if len(line) < 400]
    for kind, texts in (("新闻", headlines), ("对话", dialogue), ("百科", encyclopedia)):
        for text in rng.sample(texts, 5000):
            yield chat(f"下面的文字是新闻、对话还是百科？\n{text}", kind)
    for kind, texts in (("story", stories), ("encyclopedia", news)):
        for text in rng.sample(texts, min(len(texts), 1500)):
            yield chat(f"Is this text from a story or an encyclopedia?\n{text[: rng.randint(40, 300)]}", kind)


# Where each folder's files come from.
ORIGINS = {
    "chatlm_zh_sft_sample": "github.com/charent/ChatLM-mini-Chinese, data/",
    "ruozhiba_gpt4": "github.com/ymcui/Chinese-LLaMA-Alpaca-3, data/ (answers by GPT-4o)",
    "cdial_toy": "github.com/thu-coai/CDial-GPT, data/",
    "cmrc2018": "github.com/ymcui/cmrc2018, squad-style-data/",
    "tnews": "CLUE TNEWS, as in github.com/zejunwang1/bertorch",
    "corpus_d2l_zh": "github.com/d2l-ai/d2l-zh",
    "corpus_react_docs_zh": "github.com/reactjs/zh-hans.react.dev",
    "corpus_vue_docs_zh": "github.com/vuejs-translations/docs-zh-cn",
    "corpus_chinese_poetry": "github.com/chinese-poetry/chinese-poetry",
    "tatoeba_en_zh": "Tatoeba, English-Chinese pairs of manythings.org",
    "rasbt_instruction": "github.com/rasbt/LLMs-from-scratch, ch07",
    "self_instruct_seed": "github.com/yizhongw/self-instruct",
    "instruction_induction": "github.com/orhonovich/instruction-induction",
    "english_wordnet_synonyms": "github.com/globalwordnet/english-wordnet",
    "corpus_tinystories_1000": "1,000 stories of TinyStories (roneneldan/TinyStories)",
    "corpus_wikitext2_validtest": "WikiText-2",
    "llamafactory_demo": "the C4 sample of github.com/hiyouga/LLaMA-Factory",
}


@dataclass(frozen=True)
class Source:
    """One set: its folder, licence, reader, and how often an epoch passes over it (a fraction takes a sample)."""

    folder: str
    licence: str
    kind: str
    read: Callable[[Path], Iterator[str]]
    passes: float

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.read.__name__.strip('_')}"


SOURCES = (
    Source("chatlm_zh_sft_sample", "Apache-2.0", "Chinese instructions and answers", _chatlm, 1.5),
    Source("ruozhiba_gpt4", "Apache-2.0", "Chinese questions and answers", _ruozhiba, 1.0),
    Source("cdial_toy", "MIT", "Chinese dialogue", _dialogue, 1.5),
    Source("cmrc2018", "CC BY-SA 4.0", "Chinese prose and questions on it", _cmrc, 1.0),
    Source("tnews", "Apache-2.0", "Chinese headlines", _headlines, 0.7),
    Source("corpus_d2l_zh", "Apache-2.0", "Chinese textbook", _docs, 0.2),
    Source("corpus_react_docs_zh", "CC BY 4.0", "Chinese documentation", _docs, 0.15),
    Source("corpus_vue_docs_zh", "CC BY 4.0", "Chinese documentation", _docs, 0.15),
    Source("corpus_chinese_poetry", "MIT", "Chinese verse", _poems, 0.03),
    Source("tatoeba_en_zh", "CC BY 2.0 FR", "English-Chinese sentence pairs", _translation, 2.0),
    Source("cmrc2018", "CC BY-SA 4.0", "kinds of text, from this and four of the other sets", _genre, 1.0),
    Source("tatoeba_en_zh", "CC BY 2.0 FR", "whether two sentences translate each other", _is_translation, 1.0),
    Source("cdial_toy", "MIT", "whether a reply fits", _is_reply, 1.0),
    Source("english_wordnet_synonyms", "CC BY 4.0", "whether two words mean the same", _is_synonym, 1.0),
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
    """Every source's documents, by the source's name.

    Raises `DataError` naming every folder of `SOURCES` that is not below `root`.
    """
    missing = sorted({source.folder for source in SOURCES if not (root / source.folder).is_dir()})
    if missing:
        raise DataError(
            expected=f"one folder for each source below {root}",
            found=f"none for {', '.join(missing)}",
            fix="download the sets named in the model card and pass their parent folder as --corpora",
        )
    documents = {}
    for source in SOURCES:
        texts = (text.strip() for text in source.read(root / source.folder))
        documents[source.name] = [text for text in texts if text]
    return documents
