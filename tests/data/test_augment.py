from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ift_peft.cli import app
from ift_peft.data.augment import Perturber, augmented, perturbed
from ift_peft.data.noise import confusions
from ift_peft.data.protection import NEGATION
from ift_peft.data.row import Row, ask
from ift_peft.errors import DataError
from ift_peft.sections import Augment, Noise, Perturbation

MUCH = Noise(insert=0.1, delete=0.1, swap=0.1, confuse=0.2, spacing=0.3)
ALL = 0.999
LABELS = ("正面", "负面", "好评", "positive", "negative", "bad")
FRAGMENTS = re.findall(
    r"\S+",
    """质量 很 非常 好看 好评 正面 负面评价 不 没有 别 不好 没 无 满意 快递 客服 服务员 漂亮 价格 12 3.5元 2024年 iPhone
    王小明 北京 的 了 not never don't isn't no nor without hardly good nice terrible film The Mary positive negatively
    bad now know note {text} https://a.cn/不好?x=1 me@a.com <br> ， 。 ! ? ... : 、 ( ) ひらがな слово é 😀""",
)
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=14).flatmap(
    lambda parts: st.sampled_from(["", " "]).map(lambda gap: gap.join(parts))
)
SECTION = Perturbation(synonyms=0.9, noise=MUCH)
PERTURBER = Perturber(SECTION, protected=LABELS)
KEYS = st.text("abc", max_size=3)


def negations(text: str) -> Counter[str]:
    words = re.findall(r"(?<![a-z])(?:not|no|never|nor|without|hardly)(?![a-z])|n['’]t(?![a-z])", text.lower())
    return Counter([*words, *(character for character in text if character in "不没无别未非毫")])


def labels(text: str) -> dict[str, int]:
    return {word: len(re.findall(f"(?={word})", text.lower())) for word in LABELS}


def write(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


def lexicon_of(tmp_path: Path, text: str) -> str:
    return write(tmp_path / "lexicon.tsv", text)


def synonyms(tmp_path: Path, lexicon: str, *, protected: tuple[str, ...] = ()) -> Perturber:
    section = Perturbation(synonyms=ALL, lexicons=(lexicon_of(tmp_path, lexicon),))
    return Perturber(section, protected=protected)


def rows_of(*texts: str) -> list[Row]:
    return [
        Row((*ask(text, instruction=None, system=None), {"role": "assistant", "content": "正面"}), f"r:{n}", text=text)
        for n, text in enumerate(texts)
    ]


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(text=TEXTS, key=KEYS)
def test_labels_negations_and_numbers_are_never_changed(text: str, key: str) -> None:
    changed = PERTURBER(text, key)
    assert negations(changed) == negations(text)
    assert labels(changed) == labels(text)
    assert re.findall(r"\d+", changed) == re.findall(r"\d+", text)
    assert bool(re.search(r"[^\W\d_]", changed)) == bool(re.search(r"[^\W\d_]", text))
    for kept in ("{text}", "https://a.cn/", "me@a.com", "<br>"):
        assert changed.split().count(kept) >= text.split().count(kept)


SAME = Perturber(SECTION, protected=LABELS[::-1])


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(text=TEXTS, key=KEYS)
def test_a_change_is_a_function_of_seed_key_and_text(text: str, key: str) -> None:
    assert PERTURBER(text, key) == SAME(text, key) == PERTURBER(text, key)
    assert Perturber(Perturbation(), protected=LABELS)(text, key) == text


TEXT = "快递很慢，客服态度糟糕，价格昂贵。 The film was terrible and the story was boring."


def test_other_seeds_and_keys_change_other_things() -> None:
    made = {Perturber(Perturbation(synonyms=0.5, seed=seed), protected=())(TEXT, "k") for seed in range(4)}
    assert len(made) > 1
    perturber = Perturber(Perturbation(noise=MUCH), protected=())
    assert len({perturber(TEXT, str(key)) for key in range(8)}) > 6


def test_chinese_words_are_replaced_where_the_part_of_speech_agrees(tmp_path: Path) -> None:
    perturber = synonyms(tmp_path, "adv\t很 十分\nnoun\t质量 品质\nnoun\t漂亮 美观\nphrase\t总体来说 总的来说\n")
    assert perturber("质量很高", "k") == "品质十分高"
    assert perturber("好得很，很贵，漂亮", "k") == "好得很，十分贵，漂亮"  # no adverb after 得; 漂亮 is no noun
    assert perturber("总体来说高", "k") == "总的来说高"  # a word that jieba does not know


@pytest.mark.parametrize(
    "text",
    [
        "没有质量",
        "不是很漂亮",
        "没有那么漂亮",
        "不太漂亮",
        "it is not good",
        "It isn't a very good film",
        "never a good film",
        "without good film",
        "We saw Good Film",
        "Mr. Good left",
        "高品质漂亮",  # a label word
        "{good}",
        "https://good.com/film",
        "good@film.com",
        "<good>",
        "goodé",
        "質量とても漂亮ですね",
        "质量12",
    ],
)
def test_what_is_never_replaced(tmp_path: Path, text: str) -> None:
    lexicon = "noun\t质量 品质\nadj\t漂亮 美观\nadj\tgood nice\nnoun\tfilm movie\n"
    perturber = synonyms(tmp_path, lexicon, protected=("品质漂", "质量1"))
    assert perturber(text, "k") == text


def test_a_negation_reaches_no_further_than_its_clause(tmp_path: Path) -> None:
    perturber = synonyms(tmp_path, "adj\t漂亮 美观\nadj\tgood nice\n")
    assert perturber("不贵，漂亮", "k") == "不贵，美观"
    assert perturber("非常漂亮", "k") == "非常美观"
    assert perturber("no, good", "k") == "no, nice"
    assert perturber("not bad but good", "k") == "not bad but nice"


def test_label_words_are_not_put_in(tmp_path: Path) -> None:
    lexicon = "adj\tbad awful unpositive\n"
    assert synonyms(tmp_path, lexicon, protected=("positive", "Awful"))("bad film", "k") == "bad film"
    assert synonyms(tmp_path, lexicon, protected=("positive",))("bad film", "k") == "awful film"


def test_capitals_are_kept_and_names_are_left(tmp_path: Path) -> None:
    perturber = synonyms(tmp_path, "adj\tgood nice\nnoun\tfilm movie\n")
    assert perturber("Good film. Film of Good Film! “Good GOOD good", "k") == (
        "Nice movie. Movie of Good Film! “Nice GOOD nice"
    )


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("It was a good day, an excellent one", "It was an excellent day, a good one"),
        ("A good day. An excellent one", "An excellent day. A good one"),
        ("a great day", "a big day"),
        ("an honest try, a fair one", "a fair try, an honest one"),
        ("a unique idea", "an uncommon idea"),
        ("an uninteresting plot", "a boring plot"),
        ("vitamin a good day", "vitamin an excellent day"),  # read as an article
        ("a, good day", "a, excellent day"),
        ("a really good day", "a really excellent day"),
    ],
)
def test_a_and_an_follow_the_sound_of_the_new_word(tmp_path: Path, text: str, changed: str) -> None:
    lexicon = "adj\tgood excellent\nadj\tgreat big\nadj\thonest fair\nadj\tunique uncommon\nadj\tuninteresting boring\n"
    assert synonyms(tmp_path, lexicon)(text, "k") == changed


@pytest.mark.parametrize("kind", ["insert", "delete", "swap", "confuse", "spacing"])
def test_each_slip_does_what_it_says(kind: str) -> None:
    text = "今天收到货物觉得价格合理, 包装 整齐。 the parcel came with everything in it and works as described."
    perturber = Perturber(Perturbation(noise=Noise(**{kind: 0.2})), protected=())
    changed = [perturber(text, str(key)) for key in range(20)]
    letters = [Counter(re.findall(r"\w", one)) for one in (text, *changed)]
    assert sum(one != text for one in changed) > 15
    for one, counts in zip(changed, letters[1:], strict=True):
        if kind == "insert":
            assert letters[0] <= counts
            assert all(character in text or character.isascii() for character in one)
        elif kind == "delete":
            assert counts <= letters[0]
        elif kind == "confuse":
            assert len(one) == len(text)
        else:
            assert counts == letters[0]


def test_rates_are_shares_of_the_characters() -> None:
    text = "".join(FRAGMENTS[0] + "价格材料" for _ in range(500))
    changed = Perturber(Perturbation(noise=Noise(delete=0.1)), protected=())(text, "k")
    assert 0.07 < 1 - len(changed) / len(text) < 0.13


def test_a_name_a_number_and_a_negation_are_never_run_together_with_their_neighbours() -> None:
    text = "not , good 3 5 . Mary . bad, 不，好看"
    perturber = Perturber(Perturbation(noise=Noise(spacing=0.9)), protected=("bad",))
    for key in range(50):
        assert re.findall(r"\w+", perturber(text, str(key))) == re.findall(r"\w+", text)


@pytest.mark.parametrize("text", ["", " ", "!!!", "123", "的", "a", "😀", "不", "。"])
def test_short_texts_never_become_empty(text: str) -> None:
    perturber = Perturber(Perturbation(synonyms=ALL, noise=Noise(delete=0.9, spacing=0.9)), protected=())
    for key in range(10):
        changed = perturber(text, str(key))
        assert bool(re.search(r"[^\W\d_]", changed)) == bool(re.search(r"[^\W\d_]", text))
        assert changed.strip() or not text.strip()


def test_confusions_hold_no_negation_and_no_character_twice() -> None:
    table = confusions()
    han = [one for one in table if not one.isascii()]
    assert len(han) > 150
    assert not any(NEGATION.search(one + table[one]) for one in han)
    assert all(one not in table[one] and one in table[other] for one in table for other in table[one])


def test_augmented_copies_are_new_texts_with_the_number_of_their_row() -> None:
    rows = rows_of("质量很好，价格实惠。", "快递很慢，包装破损。", "不", "质量很好，价格实惠。")
    section = Augment(synonyms=0.5, copies=3)
    pairs = list(augmented(rows, section, protected=LABELS, forbidden=()))
    texts = [text for _, text in pairs]
    assert 2 < len(texts) == len(set(texts)) < 12
    assert not {row.text for row in rows} & set(texts)
    assert {number for number, _ in pairs} <= {0, 1, 3}
    assert pairs == list(augmented(rows, section, protected=LABELS, forbidden=()))
    held_out = set(texts[::2])
    assert not held_out & {text for _, text in augmented(rows, section, protected=LABELS, forbidden=held_out)}


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), seed=st.integers(0, 5))
def test_augmented_never_yields_a_known_text(texts: list[str], seed: int) -> None:
    section = Augment(noise=Noise(delete=0.2), copies=2, seed=seed)
    first = {text for _, text in augmented(rows_of(*texts), section, protected=LABELS, forbidden=())}
    second = {text for _, text in augmented(rows_of(*texts), section, protected=LABELS, forbidden=first)}
    assert not first & set(texts)
    assert not second & (first | set(texts))


def test_changes_do_not_depend_on_where_the_data_is_kept() -> None:
    section = Perturbation(noise=MUCH)
    (here,), (there,) = (
        [Row(row.messages, where, text=row.text) for row in rows_of(TEXT)] for where in ("/a/b/r.csv:3", "c/r.csv:3")
    )
    assert perturbed([here], section, protected=()) == perturbed([there], section, protected=())


def test_rows_without_a_text_of_their_own_are_refused() -> None:
    row = Row(({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}), "rows.jsonl:7")
    with pytest.raises(DataError, match=r"rows\.jsonl:7") as caught:
        augmented([row], Augment(), protected=(), forbidden=())
    assert "data.augment=null" in caught.value.fix
    with pytest.raises(DataError, match=r"evaluation\.perturbation=null"):
        perturbed([row], Perturbation(), protected=())


def test_real_reviews_change_and_keep_their_negations(shared: Path) -> None:
    path = shared / "data" / "online_shopping_10_cats" / "test.csv"
    if not path.is_file():
        pytest.skip("needs online_shopping_10_cats in the folder of real data")
    with path.open(encoding="utf-8", newline="") as file:
        texts = [row["review"] for row in csv.DictReader(file)][:600]
    rates = Noise(insert=0.01, delete=0.01, swap=0.01, confuse=0.02, spacing=0.02)
    synonyms, noise = (
        Perturber(section, protected=LABELS) for section in (Perturbation(synonyms=0.5), Perturbation(noise=rates))
    )
    for perturber, share in ((synonyms, 0.5), (noise, 0.5)):
        changed = [perturber(text, str(number)) for number, text in enumerate(texts)]
        assert sum(one != other for one, other in zip(texts, changed, strict=True)) > share * len(texts)
        for before, after in zip(texts, changed, strict=True):
            assert negations(before) == negations(after)
            assert re.findall(r"\d+", before) == re.findall(r"\d+", after)


RECIPE = """
data:
  train: rows.jsonl
  test: test.jsonl
  labels: [负面, 正面]
  instructions: {zh: [分类。, 判断。], en: [Classify.]}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    for name, texts in (("rows.jsonl", ["质量很好", "价格昂贵"]), ("test.jsonl", ["包装破损"])):
        lines = [json.dumps({"text": text, "label": number % 2}) for number, text in enumerate(texts)]
        write(tmp_path / name, "\n".join(lines) + "\n")
    return write(tmp_path / "recipe.yaml", RECIPE)


def test_preview_shows_texts_beside_their_changes(recipe: str) -> None:
    run = CliRunner().invoke(app, ["data", "preview", recipe, "data.augment.synonyms=0.999", "--rows", "1"])
    assert run.exit_code == 0, run.output
    assert "质量很好" in run.output
    assert "品质" in run.output
    assert "价格昂贵" not in run.output
    assert "  判断。" in run.output
    assert "  Classify." in run.output
    run = CliRunner().invoke(app, ["data", "preview", recipe, "evaluation.perturbation.noise.swap=0"])
    assert "1 of 1 left as they are" in run.output


def test_preview_names_the_sections_to_set(recipe: str) -> None:
    run = CliRunner().invoke(app, ["data", "preview", recipe])
    assert run.exit_code == 2
    assert "data.augment.synonyms=0.3" in run.output


def test_preview_imports_no_torch(recipe: str) -> None:
    code = (
        "import sys; from ift_peft.cli import app; "
        "app(['data', 'preview', sys.argv[1], 'data.augment.synonyms=0.9'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, recipe], check=True, capture_output=True)
