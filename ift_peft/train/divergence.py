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
_SPREAD = 2.5  # nats between tokens, one standard deviation: more than bases show on text they can read
_ERRORS = 3.0  # standard errors that are no noise; twice as many where it is looked for at every step
_MANY = 1_000  # choices: guessing among so many is far from what any base does with a text that it can read


def window(max_steps: int) -> int:
    """How many of the newest losses are looked at together."""
    return min(50, max(FIRST, max_steps // 10))


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
        width = window(self.max_steps)
        progress.recent_losses[:] = [*progress.recent_losses, loss][-width:]
        if step >= self.max_steps:
            self.require_learned(progress, step=step)
        elif step >= FIRST + width and len(progress.recent_losses) == width:
            self._require(progress, progress.recent_losses, step=step, every=True)

    def require_learned(self, progress: Progress, *, step: int) -> None:
        """Raises `Diverged` for a training that ended so after `step` steps."""
        recent = progress.recent_losses
        if step < 2 * FIRST:  # the first losses are the last ones too
            recent = recent[len(recent) - step // 2 :] if step >= 4 else []
        if len(recent) > 1 and progress.first_losses:
            self._require(progress, recent, step=step, every=False)

    def _require(self, progress: Progress, recent: Sequence[float], *, step: int, every: bool) -> None:
        losses = list(recent) if every else [statistics.fmean(recent)]
        start, noise, jumped = self._start(progress, short=step < 2 * FIRST)
        mean = statistics.fmean(recent)
        certain = 2 if every else 1
        told = ""
        if start < 0.95 * self.guessing and min(losses) >= 0.98 * self.guessing:
            if mean - start > (min(noise, 0.3 * self.guessing) if self.choices >= _MANY else certain * noise):
                told = f"no better than guessing among {self.choices:,} ({self.guessing:.2f})"
        elif self.shuffled and not jumped and min(losses) >= max(2 * start, max(progress.first_losses) + 1):
            spread = statistics.stdev(recent) * math.sqrt(1 / len(recent) + 1 / len(progress.first_losses))
            if mean - start > certain * max(noise, _ERRORS * spread):
                told = "far above it"
        if told:
            raise Diverged(
                expected=f"a loss that falls from {start:.2f}, where it began",
                found=f"{mean:.2f} over {len(recent)} steps up to step {step}, {told}",
                fix="lower training.learning_rate; no adapter was written",
            )

    def _start(self, progress: Progress, *, short: bool) -> tuple[float, float, bool]:
        """Where the loss began, what of a difference from there may be noise, and whether it jumped at once.

        The mean of the first steps, or, where training had left it already in these, the very first.
        """
        first, mean = progress.first_losses[0], statistics.fmean(progress.first_losses)
        jumped = short or (mean > 2 * first and mean > first + 1)
        tokens = progress.first_tokens[0] if jumped else sum(progress.first_tokens)
        noise = _ERRORS * min(_SPREAD, self.guessing) / math.sqrt(max(1, tokens))
        return (first if jumped else mean), noise, jumped
