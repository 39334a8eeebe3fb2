"""The account of one step: what its micro-batches came to, in parts or whole, read when the step ends."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ift_peft.train.losses import Sums
from ift_peft.train.out_of_memory import Batch


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward of a step came to, in one part or several; tensors are single numbers."""

    loss: Tensor
    read: Tensor
    correct: Tensor
    penalty: Tensor | None
    parts: dict[str, Tensor]
    tokens: int
    padded: int

    @property
    def numbers(self) -> list[Tensor]:
        own = [self.loss, self.read, self.correct, *self.parts.values()]
        return own if self.penalty is None else [*own, self.penalty]


@dataclass
class Totals:
    """What a step came to, in numbers.

    `loss` is what was minimised, `norm` that of its gradient, `cross_entropy` in nats, summed over `tokens` supervised
    tokens. `read` tokens went through the model, `padded` with those that fill up. `metrics` are for the log, a value
    for each micro-batch.
    """

    norm: float
    loss: float = 0.0
    cross_entropy: float = 0.0
    tokens: int = 0
    read: int = 0
    padded: int = 0
    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


class Step:
    """The step that is being taken: its `batches`, and what was made of them so far.

    Nothing is read before it ends, and then all at once: reading waits for the device.
    """

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self._micro_batches: list[MicroBatch] = []
        self._parts: list[Sums] = []  # of the micro-batch that is being run
        self._penalty: Tensor | None = None

    @property
    def in_first_part(self) -> bool:
        """Whether none of the micro-batch that is being run is done yet."""
        return not self._parts

    def begin_micro_batch(self) -> None:
        """Begin a micro-batch, or begin it again: what an attempt that broke off has left counts for nothing."""
        self._parts, self._penalty = [], None

    def add_part(self, sums: Sums, penalty: Tensor | None) -> None:
        """Take in the sums of a part whose loss is known; `penalty` is what was added to the loss, unweighted."""
        if self.in_first_part:
            self._penalty = penalty
        self._parts.append(replace(sums, loss=sums.loss.detach()))

    def end_micro_batch(self, loss: Tensor, mask: Tensor) -> None:
        """Put its parts together; `mask` is its attention mask, of shape (rows, length)."""
        parts = self._parts
        self._micro_batches.append(
            MicroBatch(
                loss,
                mask.sum(),
                torch.stack([one.correct for one in parts]).sum(),
                self._penalty,
                {name: torch.stack([one.parts[name] for one in parts]).sum() for name in parts[0].parts},
                sum(one.tokens for one in parts),
                mask.numel(),
            )
        )

    def read(self, norm: Tensor, device: torch.device) -> Totals:
        """What all of it came to, with a gradient of this `norm`."""
        numbers = [norm, *(number for one in self._micro_batches for number in one.numbers)]
        found = torch.stack([number.detach().to(device, torch.float64) for number in numbers]).tolist()
        totals = Totals(norm=found.pop(0))
        for one in self._micro_batches:
            mine, found = found[: len(one.numbers)], found[len(one.numbers) :]
            totals.loss += mine[0]
            totals.read += int(mine[1])
            totals.padded += one.padded
            totals.cross_entropy += mine[3]  # the first part of a loss
            totals.tokens += one.tokens
            tokens = max(1, one.tokens)
            totals.metrics["mean_token_accuracy"].append(mine[2] / tokens)
            for name, part in zip(one.parts, mine[3:], strict=False) if len(one.parts) > 1 else ():
                totals.metrics[name].append(part / tokens)
            if one.penalty is not None:
                totals.metrics["orthogonality"].append(mine[-1])
        return totals
