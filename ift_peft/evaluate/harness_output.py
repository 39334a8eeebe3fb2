"""What the harness says while it runs: warnings collected, progress handed on, nothing printed or forked."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ift_peft.reporter import Reporter

# What it says of every model that is handed to it loaded.
EXPECTED = ("`pretrained` model kwarg is not of type `str`", "Passed an already-initialized model")


@contextmanager
def told_to(reporter: Reporter) -> Iterator[Any]:
    """The harness without its log and bars: gives a function of what it warned of; progress goes to `reporter`."""
    import datasets
    from lm_eval import evaluator
    from lm_eval.api import metrics, model, task
    from lm_eval.models import huggingface

    logger, collector = logging.getLogger("lm_eval"), _Collector()
    before = logger.level, logger.propagate
    bars = datasets.are_progress_bars_disabled()
    own = type("Bar", (_Bar,), {"reporter": reporter})
    # No setting turns these off: bars; a bootstrap that prints and forks; git and pip, run for what is not kept.
    replaced: list[tuple[Any, str, Any]] = [(module, "tqdm", own) for module in (model, task, huggingface)]
    replaced += [(metrics, "bootstrap_stderr", _bootstrapped)]
    replaced += [(evaluator, name, lambda *_: None) for name in ("get_git_commit_hash", "add_env_info")]
    with ExitStack() as stack:
        for module, name, value in replaced:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        stack.callback(logger.setLevel, before[0])
        stack.callback(setattr, logger, "propagate", before[1])
        stack.callback(logger.removeHandler, collector)
        if not bars:
            stack.callback(datasets.enable_progress_bars)
        datasets.disable_progress_bars()
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.addHandler(collector)
        yield collector.notes


class _Collector(logging.Handler):
    """Keeps what the harness warns of, each place in its code once, with how often it did."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: Counter[tuple[str, int]] = Counter()
        self.first: dict[tuple[str, int], str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if not text.startswith(EXPECTED):
            place = (record.pathname, record.lineno)
            self.counts[place] += 1
            self.first.setdefault(place, text)

    def notes(self) -> list[str]:
        times = ((text, self.counts[place]) for place, text in self.first.items())
        return [f"lm-eval: {text}" + (f" ({count} times)" if count > 1 else "") for text, count in times]


class _Bar:
    """Stands in for the harness's progress bars: those of the model's requests go to a reporter, others nowhere."""

    def __init__(self, items: Iterable[Any] = (), *, total: int | None = None, desc: str = "", **_: Any) -> None:
        self._items, self._done = items, 0
        self._told = total is not None and bool(desc)
        if self._told:
            self.reporter.stage(f"lm-eval: {desc[:1].lower()}{desc[1:]}", total or 0)

    reporter: Reporter

    def __iter__(self) -> Iterator[Any]:
        yield from self._items

    def update(self, number: int = 1) -> None:
        self._done += number
        if self._told:
            self.reporter.advance(self._done)

    def close(self) -> None:
        if self._told:
            self.reporter.finish()


def _bootstrapped(score: Any, samples: Sequence[Any], iters: int) -> float:
    """The harness's standard error of a score that is no mean, by its own resampling, in this process."""
    from lm_eval.api import metrics

    with warnings.catch_warnings():
        # Of classes that a resample happens not to have; what is said of the samples themselves still shows.
        warnings.filterwarnings("ignore", category=UserWarning, module=r"sklearn\b")
        return float(metrics.sample_stddev(metrics._bootstrap_internal(score, iters)((0, samples))))
