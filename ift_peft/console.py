"""What the command line prints: tables, progress, errors. Nothing else in the package prints."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from rich import box
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table

from ift_peft.loading import imports

_WIDTH = None if "COLUMNS" in os.environ or sys.stdout.isatty() else 120  # rich wraps tables in a pipe at 80


class _Stderr:
    """sys.stderr, as it is at the moment, which can be written to for ever: telling something ends no training.

    A terminal that was closed and a pipe whose reader has gone refuse every write; from the first on, what is told goes
    to the null device instead. Python would end with an exit code of its own if what it holds could not be written.
    """

    encoding = "utf-8"

    @property
    def stream(self) -> Any:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # itself while a progress bar is shown

    def write(self, text: str) -> int:
        try:
            if self.stream is not None:
                self.stream.write(text)
        except OSError:
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            if self.stream is not None:
                self.stream.flush()
        except OSError:
            self._give_up()

    def isatty(self) -> bool:
        return self.stream is not None and bool(self.stream.isatty())

    def fileno(self) -> int:
        return int(self.stream.fileno())

    def _give_up(self) -> None:
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            self.stream.flush()


out = Console(soft_wrap=True, highlight=False, width=_WIDTH)
err = Console(file=cast(IO[str], _Stderr()), soft_wrap=True, highlight=False)
PLAIN_EVERY_SECONDS = 10.0
# What a terminal takes as an order, in texts and names of files that came from anywhere, and what it cannot be sent.
_ORDERS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@contextmanager
def loading(libraries: str = "torch, transformers, peft") -> Iterator[None]:
    """Tell what is imported in the block."""
    err.print(f"loading {libraries} …", style="dim")
    with imports():
        yield


def visible(text: str) -> str:
    """`text` with control characters, but tabs and line ends, as they are written in a string: \\x1b."""
    return _ORDERS.sub(lambda found: ascii(found[0])[1:-1], text)


class _Visible:
    """Something to print, whose texts are made `visible`; the styles that rich adds stay what they are."""

    def __init__(self, renderable: ConsoleRenderable) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for one in console.render(self.renderable, options):
            yield one if one.control else Segment(visible(one.text), one.style)


class _MakeVisible(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Visible(one) for one in renderables]


for _console in (out, err):
    _console.push_render_hook(_MakeVisible())


class ConsoleReporter:
    """A progress bar with detail and ETA on a terminal; a line every few seconds elsewhere. Written to stderr."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: Any = None
        self._name, self._total, self._detail = "", 0, ""
        self._done: int | None = None
        self._started = self._printed = 0.0

    def note(self, text: str) -> None:
        err.print(f"  {text}", markup=False)

    def stage(self, text: str, total: int) -> None:
        self._name, self._total, self._detail, self._done = text, total, "", None
        self._started = self._printed = time.monotonic()
        if err.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=err)
            self._bar.start()
            self._task = self._bar.add_task(text, total=total, detail="")

    def advance(self, done: int, detail: str = "") -> None:
        self._detail, self._done = detail, done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, detail=detail)
        elif time.monotonic() - self._printed > PLAIN_EVERY_SECONDS and 0 < done < self._total:
            self._printed = time.monotonic()
            left = (self._printed - self._started) / done * (self._total - done)
            self._line(f"{self._name} {done}/{self._total}", detail, f"{left:.0f} s left")

    def finish(self) -> None:
        done = self._total if self._done is None else self._done
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
            self._bar.stop()
            self._bar = None
        elif self._total:
            self._line(f"{self._name} {done}/{self._total}", self._detail, f"{time.monotonic() - self._started:.0f} s")
        self._total = 0

    @staticmethod
    def _line(*parts: str) -> None:
        err.print("  ".join(part for part in parts if part), markup=False)


def print_error(error: BaseException) -> None:
    err.print(f"error: {error}", style="red", markup=False)


def print_scores(scores: dict[str, Any], *, title: str) -> None:
    """The before-and-after table of scores.json."""
    table = _score_table(title)
    for name in scores["adapter"]:
        table.add_row(
            name, *(cell(scores[who].get(name), signed=who == "change") for who in ("base", "adapter", "change"))
        )
    calibration = scores.get("calibration", {})
    for name in calibration.get("adapter", ()):
        cells = (cell(calibration[who][name], signed=who == "change") for who in ("base", "adapter", "change"))
        table.add_row(name, *cells)
    out.print(table)
    out.print(f"\n{scores['intervals']};\nthe change is paired: both on the same resampled rows\n", markup=False)
    for name, signature in scores.get("signatures", {}).items():
        out.print(f"{name}: sacrebleu {signature}", markup=False)
    _print_by_source(scores)
    _print_probes(scores)
    _print_forgetting(scores)
    _print_safety(scores)
    if "confusion" in scores:
        _print_confusion(scores["confusion"])


def main_metric(scores: dict[str, Any]) -> str:
    """The score that tells most of a task: accuracy, the first of generated answers, or else the loss."""
    generated = [name for name in scores["adapter"] if name not in ("loss", "perplexity")]
    return generated[0] if generated else "loss"


def _print_by_source(scores: dict[str, Any]) -> None:
    """The main metric of each source of a mix."""
    if "by_source" not in scores:
        return
    table = Table(title="by source", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("", "rows", "metric", "base", "adapter", "change"):
        table.add_column(heading, justify="left" if heading in ("", "metric") else "right")
    for name, own in scores["by_source"].items():
        metric = main_metric(own)
        values = (f"{own[who][metric]['value']:.3f}" for who in ("base", "adapter"))
        table.add_row(escape(name), str(own["rows"]), metric, *values, cell(own["change"][metric], signed=True))
    out.print(table)
    out.print()


def _print_probes(scores: dict[str, Any]) -> None:
    """The same metric where rows were asked in unseen words, or their text was changed."""
    for name in ("unseen", "perturbed"):
        if name not in scores:
            continue
        probe = scores[name]
        asked = f"{probe['rows']} rows asked in {len(probe.get('phrasings', ()))} unseen phrasings"
        title = asked if "phrasings" in probe else f"{probe['rows']} rows with perturbed text"
        table = _score_table(title)
        (metric,) = probe["adapter"]
        table.add_row(
            metric, *(cell(probe[who].get(metric), signed=who == "change") for who in ("base", "adapter", "change"))
        )
        if "spread" in probe:
            table.add_row("spread", *(f"{probe['spread'][who]:.3f} best - worst" for who in ("base", "adapter")), "")
        out.print(table)
        out.print()


def _print_forgetting(scores: dict[str, Any]) -> None:
    """The loss on general text, in nats per token: what the task cost the rest."""
    if "forgetting" not in scores:
        return
    measured = scores["forgetting"]
    table = _score_table(f"forgetting: {measured['texts']} general texts ({escape(measured['text'])})")
    cells = (cell(measured[who]["loss"], signed=who == "change") for who in ("base", "adapter", "change"))
    table.add_row("loss", *cells)
    out.print(table)
    out.print()


def _print_safety(scores: dict[str, Any]) -> None:
    """Refusals of harmful and of harmless prompts, and what else the answers were."""
    if "safety" not in scores:
        return
    for of in ("harmful", "harmless"):
        measured = scores["safety"][of]
        table = _score_table(f"safety: {measured['rows']} {of} prompts ({escape(measured['source'])})")
        for name in measured["adapter"]:
            cells = (cell(measured[who][name], signed=who == "change") for who in ("base", "adapter", "change"))
            table.add_row(name.replace("_", " "), *cells)
        out.print(table)
    out.print(f"\n{scores['safety']['intervals']};\nrefusals are told by their first words\n", markup=False)


def _score_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("", "base", "adapter", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    return table


def cell(part: dict[str, float] | None, *, signed: bool) -> str:
    """A score with its interval, as in scores.json; nothing for None."""
    if part is None:
        return ""
    sign = "+" if signed else ""
    return f"{part['value']:{sign}.3f} [{part['low']:{sign}.3f}, {part['high']:{sign}.3f}]"


def _print_confusion(confusion: dict[str, Any]) -> None:
    labels = confusion["labels"]
    if len(labels) > 10:
        return
    table = Table(title="adapter: true class by row, answer by column", title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for label in labels:
        table.add_column(escape(label), justify="right")
    for label, counts in zip(labels, confusion["adapter"], strict=True):
        table.add_row(escape(label), *map(str, counts))
    out.print(table)


def stream(text: str) -> None:
    """Write an answer: unchanged into a file or pipe, with no orders for it to a terminal."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
