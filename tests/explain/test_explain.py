"""The command, and what it writes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ift_peft import console
from ift_peft.cli.explain import _marked
from ift_peft.errors import DataError
from ift_peft.explain.explanation import explain, with_training_rows
from ift_peft.explain.influence import TrainingRows, training_rows
from ift_peft.explain.page import page
from ift_peft.infer.load import Parts
from ift_peft.reporter import Silent
from ift_peft.run_dir import RunDir
from tests.conftest import Ift
from tests.explain.conftest import QUERY

pytestmark = pytest.mark.slow


def test_lines_of_standard_input_are_explained_in_words_html_and_json(
    cued_run: RunDir, ift: Ift, tmp_path: Path
) -> None:
    done = ift(
        *("explain", str(cued_run.path), "--sample", "12", "--rows", "2", "--top", "3"),
        *("--html", "page.html", "--json", "found.json"),
        stdin=f"{QUERY}\n\nletter window awful garden\n",
    )
    assert done.returncode == 0, done.stderr
    assert "⟦+great⟧" in done.stdout and "⟦+awful⟧" in done.stdout
    assert "\x1b" not in done.stdout
    assert "12 of 320 training rows looked at" in done.stdout
    assert "arning" not in done.stderr
    content = json.loads((tmp_path / "found.json").read_text("utf-8"))
    first, second = content["explanations"]
    assert (first["answer"], second["answer"]) == ("正面", "负面")
    strongest = max(first["pieces"], key=lambda piece: abs(piece["adapter"]))
    assert (strongest["text"], strongest["kind"]) == (" great", "text")
    assert first["training_rows"]["looked_at"] == 12
    assert len(first["training_rows"]["helping"]) <= 2
    assert " great</span>" in (tmp_path / "page.html").read_text("utf-8")


def test_nothing_in_a_page_comes_from_the_text_as_markup(model: Any, parts: Parts) -> None:
    text = '</span><script>alert("1")</script> & {{ 7 * 7 }}'
    one = explain(model, parts, text, method="integrated-gradients", steps=4)
    drawn = training_rows(parts, model, sample=4, seed=0)
    bad = [*drawn.rows[:3], drawn.rows[3].__class__(drawn.rows[3].messages, "<i>.jsonl:1", text="<script>x</script>")]
    (one,) = with_training_rows(model, parts, [one], TrainingRows(bad, drawn.rendered, 4), rows=4, reporter=Silent())
    made = page([one], run="<b>run</b>", top=30)
    assert "<script" not in made and "<b>" not in made and "<i>" not in made
    assert "&lt;script&gt;x&lt;/script&gt;" in made
    assert "{{ 7 * 7 }}" in re.sub(r"<[^>]*>", "", made)
    assert not re.search(r"https?:|src=|href=|@import|url\(", made)
    shown = re.search(r'<p class="prompt">(.*?)</p>', made, re.DOTALL)
    assert shown is not None and shown[1].count("<span") == len(one.pieces) == shown[1].count("</span>")


def test_colours_tell_for_from_against(model: Any, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    one = explain(model, parts, QUERY, method="occlusion", answer="负面")
    written = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=written, force_terminal=True, color_system="truecolor"))
    console.out.print(_marked(one.pieces, one.adapter))
    against = re.search(r"\x1b\[1;30;48;2;230;159;0m great\x1b", written.getvalue())
    assert against is not None, written.getvalue()
    written.truncate(0)
    console.out.print(_marked(one.pieces, explain(model, parts, QUERY, method="occlusion").adapter))
    assert re.search(r"\x1b\[1;37;48;2;0;114;178m great\x1b", written.getvalue()) is not None


def test_an_answer_that_is_no_label_is_refused(model: Any, parts: Parts) -> None:
    with pytest.raises(DataError, match="负面, 正面"):
        explain(model, parts, QUERY, method="occlusion", answer="neutral")
