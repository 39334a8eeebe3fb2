"""Whether a training has lost what its base knew: a loss stuck at guessing, or far above where it began.

The loss here is the cross-entropy per supervised token (per row, with a classifier's head), without the penalties and
divergences that may be minimised beside it: those have no level that means guessing, and begin at zero. Label smoothing
is in it, and leaves guessing where it is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ift_peft.errors import Diverged
from ift_peft.train.progress import Progress

FIRST = 5
RISEN = 20  # losses, at least, of which every one has to be far above the start: a mix is long rows for many steps
_FEWEST = 10  # where a run is too short for so many, and its last half is looked at
_SPREAD = 2.5  # nats between tokens, one standard deviation: more than bases show on text they can read
_ERRORS = 3.0  # standard errors that are no noise; twice as many where it is looked for at every step
_MANY = 1_000  # choices: guessing among so many is far from what any base does with a text that it can read


def window(max_steps: int, *, least: int) -> int:
    """How many of the newest losses are looked at together: a tenth of all, but `least`, and 50 at most."""
    return min(50, max(least, max_steps // 10))


@dataclass(frozen=True)
class Guard:
    """Looks at the losses of a training of `max_steps`, among `choices` tokens or classes.

    `shuffled`: rows come in no order, so that later ones are like the first, and answers are all that is learnt. Only
    then is a loss that has risen a fault; after a teacher, or from easy rows to hard ones, it may rise.
    """

    choices: int
    max_steps: int
    shuffled: bool = True

    @property
    def guessing(self) -> float:
        return math.log(max(2, self.choices))

    def add(self, progress: Progress, loss: float, *, tokens: int, step: int) -> None:
        """Take in the loss of a step, counted from 1. Raises `Diverged` at the last one, or where it is certain."""
        if len(progress.first_losses) < FIRST:
            progress.first_losses.append(loss)
            progress.first_tokens.append(tokens)
        risen = window(self.max_steps, least=RISEN)
        progress.recent_losses[:] = [*progress.recent_losses, loss][-risen:]
        if step >= self.max_steps:
            self.require_learned(progress, step=step)
            return
        guessed = window(self.max_steps, least=FIRST)
        recent = progress.recent_losses
        if step >= FIRST + guessed and len(recent) >= guessed:
            self._require_no_guessing(progress, recent[-guessed:], step=step, every=True)
        if step >= FIRST + risen and len(recent) == risen:
            self._require_not_risen(progress, recent, step=step, certain=2)

    def require_learned(self, progress: Progress, *, step: int) -> None:
        """Raises `Diverged` for a training that ended so after `step` steps."""
        recent, half = progress.recent_losses, step // 2
        if not progress.first_losses:
            return
        # Before that many steps the first losses are among the newest ones, or close to them.
        guessed = window(self.max_steps, least=FIRST) if step >= 2 * FIRST else half
        risen = window(self.max_steps, least=RISEN)
        risen = risen if step >= FIRST + risen else half
        if guessed > 1 and len(recent) > 1:
            self._require_no_guessing(progress, recent[-guessed:], step=step, every=False)
        if min(risen, len(recent)) >= _FEWEST:
            self._require_not_risen(progress, recent[-risen:], step=step, certain=1)

    def _require_no_guessing(self, progress: Progress, recent: Sequence[float], *, step: int, every: bool) -> None:
        """`every`: each of the losses has to be, not just their mean, and with more certainty."""
        start, noise, _ = self._start(progress, short=step < 2 * FIRST)
        mean = statistics.fmean(recent)
        if start < 0.95 * self.guessing and (min(recent) if every else mean) >= 0.98 * self.guessing:
            certain = 2 if every else 1
            if mean - start > (min(noise, 0.3 * self.guessing) if self.choices >= _MANY else certain * noise):
                told = f"no better than guessing among {self.choices:,} ({self.guessing:.2f})"
                raise _diverged(start, recent, step=step, told=told)

    def _require_not_risen(self, progress: Progress, recent: Sequence[float], *, step: int, certain: int) -> None:
        """Each of the losses has to be far above: batches of like length are of one kind, and of another for a while.

        A mean would rise with a few more of the kind that is hard.
        """
        start, noise, jumped = self._start(progress, short=False)
        if self.shuffled and not jumped and min(recent) >= max(2 * start, max(progress.first_losses) + 1):
            spread = statistics.stdev(recent) * math.sqrt(1 / len(recent) + 1 / len(progress.first_losses))
            if statistics.fmean(recent) - start > certain * max(noise, _ERRORS * spread):
                raise _diverged(start, recent, step=step, told="far above it")

    def _start(self, progress: Progress, *, short: bool) -> tuple[float, float, bool]:
        """Where the loss began, what of a difference from there may be noise, and whether it jumped at once.

        The mean of the first steps, or, where training had left it already in these, the very first.
        """
        first, mean = progress.first_losses[0], statistics.fmean(progress.first_losses)
        jumped = short or (mean > 2 * first and mean > first + 1)
        tokens = progress.first_tokens[0] if jumped else sum(progress.first_tokens)
        noise = _ERRORS * min(_SPREAD, self.guessing) / math.sqrt(max(1, tokens))
        return (first if jumped else mean), noise, jumped


def _diverged(start: float, recent: Sequence[float], *, step: int, told: str) -> Diverged:
    return Diverged(
        expected=f"a loss that falls from {start:.2f}, where it began",
        found=f"{statistics.fmean(recent):.2f} over {len(recent)} steps up to step {step}, {told}",
        fix="lower training.learning_rate; no adapter was written",
    )
