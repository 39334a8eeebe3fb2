"""A model that runs out of memory with more than so many rows at a time."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import TrainerCallback

from ift_peft.reporter import Silent


class OutOfRows(TrainerCallback):
    """Lets training run out of memory with more than `most` rows at a time, in steps `since` and later, from 0.

    That is `at` the begin of a forward pass, before anything is drawn at random, or at the end of a backward pass, when
    all gradients but those of an adapted embedding are there. `refused` counts how often; `tried` holds all numbers of
    rows that there were at a time.
    """

    def __init__(self, most: int = 1000, *, since: int = 0, at: Literal["forward", "backward"] = "forward") -> None:
        self.most, self.since, self.at = most, since, at
        self.refused, self.tried = 0, set[int]()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        def refuse(gradient: torch.Tensor | None = None) -> None:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

        def is_too_much(module: Any, inputs: tuple[torch.Tensor, ...]) -> bool:
            return module.training and state.global_step >= self.since and len(inputs[0]) > self.most

        def forward(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            if module.training:
                self.tried.add(len(inputs[0]))
            if self.at == "forward" and is_too_much(module, inputs):
                refuse()

        def backward(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if self.at == "backward" and is_too_much(module, inputs):
                output.register_hook(refuse)

        embeddings = model.get_input_embeddings()
        embeddings.register_forward_pre_hook(forward)
        embeddings.register_forward_hook(backward)


class Telling(Silent):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
