"""How much each token of a prompt adds to a score, by captum's methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from captum.attr import FeatureAblation, IntegratedGradients
from torch import Tensor

from ift_peft.explain.pieces import Piece
from ift_peft.explain.score import Score

Method = Literal["occlusion", "integrated-gradients"]
METHODS: tuple[Method, ...] = get_args(Method)
STEPS = 32


@dataclass(frozen=True)
class Attribution:
    """What each piece of a prompt adds to `score`, in nats; 0 for the chat template's.

    `baseline` is the score without instruction and text, where `values` are meant to add up to `score` - `baseline`;
    None where they are not.
    """

    values: tuple[float, ...]
    score: float
    baseline: float | None = None

    @property
    def delta(self) -> float | None:
        """How far the values are from adding up: 0 for an exact integral."""
        return None if self.baseline is None else sum(self.values) - (self.score - self.baseline)


def attribute(
    model: Any,
    score: Score,
    ids: Sequence[int],
    pieces: Sequence[Piece],
    *,
    method: Method,
    pad_token_id: int,
    steps: int = STEPS,
    batch_size: int = 16,
) -> Attribution:
    """Attribute `score` of the prompt `ids` to its pieces, with the model as it is set (adapter on or off).

    occlusion: what the score loses when the piece is taken out of the prompt and the rest moves together.
    integrated-gradients (Sundararajan et al. 2017, arXiv:1703.01365): along the straight line, in the space of input
    embeddings, from the same prompt with padding tokens in place of instruction and text; `steps` points of
    Gauss-Legendre quadrature. (A line from zero cannot be integrated: layers begin with a norm that is singular there.)
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        # In float32, so that the points of the line and the sum over them are not rounded to the model's type.
        embedded = model.get_input_embeddings()(torch.tensor([list(ids)], device=device)).float()
        present = torch.ones((1, len(pieces)), device=device)
        value = float(score(model, embedded, kept_tokens(pieces, present)))
    if method == "occlusion":

        def without(present: Tensor) -> Tensor:
            return score(model, embedded.expand(len(present), -1, -1), kept_tokens(pieces, present))

        with torch.no_grad():
            values = FeatureAblation(without).attribute(present, perturbations_per_eval=batch_size)
        return Attribution(
            tuple(0.0 if p.kind == "template" else v for p, v in zip(pieces, values[0].tolist(), strict=True)), value
        )

    def along(inputs: Tensor) -> Tensor:
        return score(model, inputs, kept_tokens(pieces, present).expand(len(inputs), -1))

    with torch.no_grad():
        padding = model.get_input_embeddings()(torch.tensor(pad_token_id, device=device)).float()
        baseline = torch.where(kept_tokens(pieces, 0 * present)[:, :, None], embedded, padding)
        bottom = float(along(baseline))
    by_width = IntegratedGradients(along).attribute(
        embedded.requires_grad_(), baselines=baseline, n_steps=steps, internal_batch_size=batch_size
    )
    by_token = by_width.detach().double().sum(dim=-1)[0]
    return Attribution(tuple(float(by_token[piece.start : piece.end].sum()) for piece in pieces), value, bottom)


def kept_tokens(pieces: Sequence[Piece], present: Tensor) -> Tensor:
    """Bool of shape (n, tokens): which are there where `present`, of shape (n, pieces), is not 0; template always."""
    template = torch.tensor([piece.kind == "template" for piece in pieces], device=present.device)
    lengths = torch.tensor([piece.end - piece.start for piece in pieces], device=present.device)
    return (present.bool() | template).repeat_interleave(lengths, dim=1)
