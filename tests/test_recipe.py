from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from ift_peft.errors import Faults, RecipeError
from ift_peft.recipe import dump_recipe, find_recipe, load_recipe, shipped_recipes, validate
from ift_peft.run_dir import RunDir
from ift_peft.yaml_source import YamlSource, dump_yaml, parse_value, read_yaml

MINIMAL = "data:\n  train: rows.jsonl\n"


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text, "utf-8")
    return str(path)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_loads_with_existing_rows_and_a_description(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    for part, _ in recipe.data.by_source():
        assert part.train is not None and part.test is not None
        assert Path(part.train).is_file() and Path(part.test).is_file()


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_dumped_recipe_loads_to_an_equal_one(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe), "utf-8")
    assert validate(read_yaml(path)) == recipe


def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    path = written(tmp_path, "data:\n  train: rows.jsonl\n  instructoin: x\n")
    with pytest.raises(RecipeError, match=r"'instructoin' at .*mine\.yaml:3[\s\S]*did you mean 'instruction'"):
        load_recipe(path)


def test_all_faults_of_a_recipe_are_told_at_once(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "bse: {}\nbase:\n  quantization: nf5\nadapter:\n  r: 0\ndata:\n  train: a\n  labels: [one]\n"
        "training:\n  lerning_rate: 1e-4\n  seed: many\n  packing: true\n",
    )
    with pytest.raises(Faults) as caught:
        load_recipe(path)
    text = str(caught.value)
    for part in ("'bse'", "nf5", "adapter.r", "labels", "did you mean 'learning_rate'", "training.seed", "packing"):
        assert part in text
    for line in ("mine.yaml:1", "mine.yaml:3", "mine.yaml:5", "mine.yaml:8", "mine.yaml:10", "mine.yaml:11"):
        assert line in text
    assert len(caught.value.faults) == 7


@pytest.mark.parametrize("setting", ["save_only_model", "ignore_data_skip"])
def test_what_a_run_could_not_be_gone_on_with_is_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(RecipeError, match=rf"training without {setting}[\s\S]*remove it: a (checkpoint|resumed run)"):
        load_recipe(written(tmp_path, f"{MINIMAL}training: {{{setting}: true}}\n"))


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'train' at .*:2 and again at line 3"):
        load_recipe(written(tmp_path, "data:\n  train: a\n  train: b\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty file"),
        ("- a\n", "a list"),
        ("data: [\n", r"mine\.yaml:2"),
        ("data: {}\n", "either train or sources"),
    ],
)
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, text))


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes("data: {train: 评论}\n".encode("gb18030"))
    with pytest.raises(RecipeError, match="offset 14"):
        load_recipe(str(path))


def test_overrides_replace_add_and_are_named_in_errors(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL + "training:\n  seed: 1\n")
    recipe = load_recipe(
        path, ["training.seed=2", "training.learning_rate=1e-4", "data.labels=[负面,正面]", "adapter.r=4"]
    )
    assert recipe.training == {"seed": 2, "learning_rate": 1e-4}
    assert recipe.data.label_words == ("负面", "正面")
    assert recipe.adapter.r == 4
    with pytest.raises(RecipeError, match=r"override 'training\.sed=2'"):
        load_recipe(path, ["training.sed=2"])
    with pytest.raises(RecipeError, match=r"section\.key=value"):
        load_recipe(path, ["training.seed"])


def test_paths_are_relative_to_the_file_or_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    for folder in ("there", "here"):
        (tmp_path / folder / "rows.jsonl").write_text("", "utf-8")
    recipe_path = written(tmp_path / "there", MINIMAL)
    monkeypatch.chdir(tmp_path / "here")
    assert load_recipe(recipe_path).data.train == str(tmp_path / "there" / "rows.jsonl")
    assert load_recipe(recipe_path, ["data.train=rows.jsonl"]).data.train == str(tmp_path / "here" / "rows.jsonl")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E3", 2e3),
        ("1.5e-4", 1.5e-4),
        ("12", 12),
        ("e5", "e5"),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
    ],
)
def test_numbers_are_read_as_yaml_1_2_reads_them(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_an_unknown_recipe_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'sentiment'"):
        find_recipe("sentimnet")


def test_an_override_of_a_list_forgets_the_lines_of_what_it_replaced() -> None:
    source = YamlSource(
        "x", {"data": {"labels": ["a", "b"]}}, {("data", "labels"): "x:2", ("data", "labels", 0): "x:3"}
    )
    source.override("data.labels=[c,d]")
    assert source.where(("data", "labels", 0)) == "override 'data.labels=[c,d]'"


def test_yes_and_no_are_label_words_and_null_is_not_one(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MINIMAL + "  labels: [no, yes]\n"))
    assert recipe.data.label_words == ("no", "yes")
    for labels in ("[yes, null]", "[true, false]"):
        with pytest.raises(RecipeError, match="quote null"):
            load_recipe(written(tmp_path, MINIMAL + f"  labels: {labels}\n"))


def test_a_data_file_named_in_a_recipe_is_never_taken_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "rows.jsonl").write_text("", "utf-8")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(written(tmp_path / "there", MINIMAL))
    assert recipe.data.train == str(tmp_path / "there" / "rows.jsonl")


def test_every_short_word_of_signs_and_digits_is_read_as_it_was_dumped() -> None:
    words = ["".join(word) for length in (1, 2, 3) for word in itertools.product("0189_+-.eExb:", repeat=length)]
    assert parse_value(dump_yaml(words)) == words
    values = [8, -0.5, 1e-4, 2e20, True, None, "yes", "2024-01-31", float("inf"), "12:30"]
    assert parse_value(dump_yaml(values)) == values


@pytest.mark.parametrize("word", ["08", "09", "018", "0_8", "-08", "010", "-.5", "+.1", "1_000x"])
def test_what_only_some_read_as_a_number_is_a_word(word: str) -> None:
    assert parse_value(f"[{word}]") == [word]  # as runs hold it, which quoted what YAML 1.1 takes for a number


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("-8", -8), ("1_0", 10), ("0x1f", 31), ("1e-4", 1e-4), ("0.5", 0.5), ("08.5", 8.5)],
)
def test_numbers_are_read_as_such(text: str, number: float) -> None:
    assert parse_value(text) == number and type(parse_value(text)) is type(number)


@pytest.mark.parametrize("digits", ["1", "1_", ".1", "1:1"])
def test_a_word_that_begins_like_a_number_of_300_000_digits_is_read(digits: str) -> None:
    word = digits * (300_000 // len(digits)) + "x"  # which by a pattern that tries every split would take an hour
    assert parse_value(word) == word
    assert dump_yaml([word]).endswith("x\n")


LONG = ["a" * 500_000, "b" * 500_000]
ESCAPED = ["\x01" * 50_000 + letter for letter in "abcdefghij"]  # \x01 is four characters in YAML
MANY = [f"{number:x}" for number in range(100_000)]


@pytest.mark.slow
@pytest.mark.parametrize("lines", [LONG, ESCAPED, MANY], ids=["long", "escaped", "many"])
def test_a_run_with_the_phrasings_of_a_large_file_is_opened(lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "pool.txt").write_text("\n".join(lines), "utf-8")
    recipe = load_recipe(written(tmp_path, f"{MINIMAL}  instructions: pool.txt\n"))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), "utf-8")
    assert RunDir(tmp_path).recipe() == recipe


def test_more_phrasings_than_a_run_can_hold_are_refused_as_they_are_read(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"pool{number}.txt").write_text("a" * 1_000_000, "utf-8")
    sources = "".join(f"    - {{name: s{n}, train: rows{n}.jsonl, instructions: pool{n}.txt}}\n" for n in range(5))
    with pytest.raises(RecipeError, match=r"more than 4 MiB of phrasings in all[\s\S]*pool4"):
        load_recipe(written(tmp_path, f"data:\n  sources:\n{sources}"))


def test_a_long_text_repeated_by_aliases_is_refused(tmp_path: Path) -> None:
    repeated = f"x: [&a {'a' * 900_000}{', *a' * 10}]\n"
    with pytest.raises(RecipeError, match="more than 4,194,304 characters, counting"):
        load_recipe(written(tmp_path, MINIMAL + repeated))
