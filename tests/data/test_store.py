"""Rendering to disk: what streams equals what is read at once, and what was rendered is found again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ift_peft.data.fit import fit_rows
from ift_peft.data.render import Renderer
from ift_peft.data.row import Row
from ift_peft.data.rows import held_out_rows, read_rows, stream_rows
from ift_peft.data.store import RenderedSet, content_key, render_set
from ift_peft.errors import DataError, Faults
from ift_peft.model.tokenizer import TINY
from ift_peft.sections import Data

TEXTS = ["很好", "The room was cold and the staff were rude. " * 20, "一般", "味道不错，送得也快" * 4]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(TINY))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IFT_PEFT_CACHE", str(tmp_path / "cache"))


def written(folder: Path, rows: int) -> Data:
    for name, start in (("train", 0), ("test", 10_000)):
        lines = [{"text": f"{TEXTS[n % 4]}{start + n}", "label": ["负面", "正面"][n % 2]} for n in range(rows)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")
    return Data(
        train=str(folder / "train.jsonl"),
        test=str(folder / "test.jsonl"),
        instruction="分类。",
        labels=("负面", "正面"),
    )


def store(rows: Any, renderer: Renderer, *, key: str | None = None, **settings: Any) -> RenderedSet:
    settings = {"variants": 1, "max_length": 64, "overlong": "truncate", **settings}
    return render_set(lambda: iter(rows), renderer, key=key, **settings)


@pytest.mark.parametrize("rows", [1, 999, 1001])
def test_streamed_rows_are_those_read_at_once(tmp_path: Path, renderer: Renderer, rows: int) -> None:
    data = written(tmp_path, rows)
    train, test = read_rows(data)
    assert list(stream_rows(data)) == train
    assert held_out_rows(data) == test
    fitted = fit_rows(train, renderer, max_length=64, overlong="truncate")
    stored = store(stream_rows(data), renderer)
    assert stored.dataset["input_ids"][:] == [one.input_ids for one in fitted.rendered]
    assert stored.dataset["labels"][:] == [one.labels for one in fitted.rendered]
    assert stored.column("length").tolist() == [len(one.input_ids) for one in fitted.rendered]
    assert (stored.facts["tokens"], stored.facts["supervised_tokens"]) == (fitted.tokens, fitted.supervised_tokens)
    assert stored.fit.truncated == fitted.fit.truncated == sum(n % 4 == 1 for n in range(rows))
    assert stored.facts["golden"]["messages"] == list(fitted.rows[0].messages)


def test_what_was_rendered_is_found_again_until_content_or_settings_change(tmp_path: Path, renderer: Renderer) -> None:
    data = written(tmp_path, 5)

    def key(data: Data = data, **settings: Any) -> str | None:
        return content_key(data, renderer, **{"max_length": 64, "variants": 1, **settings})

    first = store(stream_rows(data), renderer, key=key())
    assert not first.reused

    def never() -> Iterator[Row]:
        raise AssertionError("rendered again")
        yield

    again = store(never(), renderer, key=key())
    assert again.reused
    assert again.facts == first.facts
    assert again.dataset["input_ids"][:] == first.dataset["input_ids"][:]
    keys = {key(), key(max_length=63), key(variants=2), key(data.model_copy(update={"instruction": "判断。"}))}
    text = (tmp_path / "train.jsonl").read_text("utf-8")
    (tmp_path / "train.jsonl").write_text(text.replace("很好0", "还好0"), "utf-8")
    assert len(keys | {key()}) == 5


def test_a_failed_rendering_leaves_nothing_in_the_cache(tmp_path: Path, renderer: Renderer) -> None:
    data = written(tmp_path, 5)
    with pytest.raises((DataError, Faults)):
        store(stream_rows(data), renderer, key="k", max_length=3)
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_row_left_out_in_one_wording_is_left_out_in_all(renderer: Renderer) -> None:
    def row(text: str) -> Row:
        return Row(({"role": "user", "content": text}, {"role": "assistant", "content": "好"}), "x", text=text)

    rows = [row("短"), row("短二"), row("短三"), row("很长" * 80), row("短五"), row("短六")]
    stored = store(rows, renderer, variants=2, overlong="drop")
    assert (stored.rows, stored.variants, stored.fit.dropped) == (2, 2, 1)
    assert stored.facts["tokens"] == int(stored.column("length").sum())
    expected = fit_rows([rows[i] for i in (0, 1, 4, 5)], renderer, max_length=64, overlong="drop").rendered
    assert stored.dataset["input_ids"][:] == [one.input_ids for one in expected]


def test_a_stream_stops_early_when_hardly_a_row_is_usable(tmp_path: Path) -> None:
    data = written(tmp_path, 3)
    (tmp_path / "train.jsonl").write_text("not json\n" * 5000, "utf-8")
    with pytest.raises(Faults, match="more faults like these"):
        list(stream_rows(data))


def test_held_out_rows_are_never_streamed_into_training(tmp_path: Path) -> None:
    data = written(tmp_path, 3)
    same = data.model_copy(update={"test": data.train})
    with pytest.raises(DataError, match="training and held-out rows from different files"):
        list(stream_rows(same, held_out={row.where for row in held_out_rows(same)}))


def test_sources_are_read_in_order_each_by_its_own_settings(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "好", "label": "正面"}\n{"text": "差", "label": "负面"}\n', "utf-8")
    (tmp_path / "b.jsonl").write_text('{"q": "1+1", "a": "2"}\n', "utf-8")
    section = Data.model_validate(
        {
            "sources": [
                {"train": str(tmp_path / "a.jsonl"), "instruction": "分类。", "weight": 2.0},
                {"train": str(tmp_path / "b.jsonl"), "columns": {"text": "q", "answer": "a"}, "system": "算。"},
            ],
            "columns": {"text": "text", "answer": "label"},
            "test_size": 1,
        }
    )
    assert [weight for _, weight in section.by_source()] == [2.0, 1.0]
    train, test = read_rows(section)
    rows = sorted([*train, *test], key=lambda row: row.where)
    assert [row.source for row in rows] == [0, 0, 1]
    assert [row.messages[-2]["content"] for row in rows] == ["分类。\n好", "分类。\n差", "1+1"]
    assert rows[2].messages[0] == {"role": "system", "content": "算。"}
    assert list(stream_rows(section)) == rows
