from __future__ import annotations

import json
from pathlib import Path

import pytest

from ift_peft.data.augment import Perturber
from ift_peft.data.protection import NEGATION
from ift_peft.data.synonyms import load_lexicon
from ift_peft.errors import DataError
from ift_peft.sections import Perturbation


def write(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


def test_cilin_lists_synonyms_under_codes_with_an_equals_sign(tmp_path: Path) -> None:
    path = write(
        tmp_path / "cilin.txt",
        "A 人\r\nAa01 人 人民\r\nAa01A01= 人士 人物 人选\r\nBb01A01= 人物 图像\r\nEd01A01= 美丽 好看 不丑\r\n"
        "Ed02A01# 高 矮\r\nHa01A01= 高 攀 爬\r\nHb01A01@ 爬\r\nKa01A01= 刚刚 刚才\r\nKb01A01= 关于 对于\r\n",
    )
    lexicon = load_lexicon([path])
    assert lexicon.zh["人士"] == ("noun", ("人士", "人选"))
    assert lexicon.zh["美丽"] == ("adj", ("美丽", "好看"))  # without 不丑, which negates
    assert (lexicon.zh["刚刚"].part, lexicon.zh["关于"].part) == ("adv", None)
    assert not {"人物", "图像", "高", "攀", "爬", "人民"} & lexicon.zh.keys()
    assert not lexicon.en


def test_wordnet_gives_words_of_one_synset_only(tmp_path: Path) -> None:
    synsets = [
        ("n", ["car", "auto", "motor_car", "motor car", "machine"]),
        ("n", ["machine", "device"]),
        ("s", ["big", "large", "bountiful"]),
        ("v", ["large", "enlarge"]),
        ("n", ["china", "porcelain", "ware"]),
        ("n", ["China", "PRC"]),
        ("r", ["fast", "quickly", "no end"]),
    ]
    lines = [json.dumps({"id": str(n), "pos": pos, "members": words}) for n, (pos, words) in enumerate(synsets)]
    lexicon = load_lexicon([write(tmp_path / "wordnet.jsonl", "\n".join(lines) + "\n\n")])
    assert lexicon.en["car"] == ("noun", ("car", "auto"))
    assert lexicon.en["big"] == ("adj", ("big", "bountiful"))
    assert lexicon.en["porcelain"].words == ("porcelain", "ware")
    assert lexicon.en["fast"].part == "adv"
    assert not {"machine", "large", "enlarge", "china", "China", "PRC", "motor_car"} & lexicon.en.keys()


def test_earlier_lexicons_win_also_where_they_find_a_word_ambiguous(tmp_path: Path) -> None:
    first = write(tmp_path / "1.tsv", "# x\nadj\tgood nice\nadj\tbig large\nnoun\tbig chief\n")
    second = write(tmp_path / "2.tsv", "adj\tgood fine\nadj\tbig huge\n")
    lexicon = load_lexicon([first, second])
    assert lexicon.en["good"].words == ("good", "nice")
    assert lexicon.en["fine"].words == ("good", "fine")
    assert "big" not in lexicon.en


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing known\n", "none of these"),
        ("", "none of these"),
        ('{"pos": "n", "members": ["a", "b"]}\n{"pos": "n"\n', "x:2"),
        ('{"pos": "q", "members": ["a", "b"]}\n', "x:1"),
        ("adj\tgood nice\nadjective\tbad\n", "x:2"),
    ],
)
def test_what_is_wrong_with_a_lexicon_is_told(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_lexicon([write(tmp_path / "x", content)])


def test_missing_and_wrongly_encoded_lexicons_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        Perturber(Perturbation(synonyms=0.1, lexicons=("nowhere.txt",)), protected=())
    (tmp_path / "gbk").write_bytes("Aa01A01= 人 士".encode("gb18030"))
    with pytest.raises(DataError, match="UTF-8"):
        load_lexicon([str(tmp_path / "gbk")])


def test_the_builtin_lexicon_has_both_languages_and_no_ambiguous_word() -> None:
    lexicon = load_lexicon(["builtin"])
    for words in (lexicon.zh, lexicon.en):
        assert len(words) > 500
        assert all(len(group.words) > 1 and word in group.words for word, group in words.items())
        assert not any(NEGATION.search(word) for word in words)


@pytest.mark.parametrize(
    ("name", "word", "other"),
    [
        ("cilin_synonyms/cilin.txt", "雇主", "奴隶主"),
        ("cilin_synonyms/new_cilin.txt", "雇主", "奴隶主"),
        ("english_wordnet_synonyms/synonyms.jsonl", "ramshackle", "dilapidated"),
    ],
)
def test_real_lexicons_are_read(shared: Path, name: str, word: str, other: str) -> None:
    path = shared / "data" / name
    if not path.is_file():
        pytest.skip(f"needs {name} in the folder of real data")
    lexicon = load_lexicon([str(path)])
    words = lexicon.zh or lexicon.en
    assert len(words) > 20_000
    assert other in words[word].words
