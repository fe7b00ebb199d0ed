"""IterSmooth: masks carry what the model expects of them to the next forward (arXiv 2510.08666)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.selection import above
from dmax.decoding.strategy import Number, Strategy, number
from dmax.errors import InputError


@dataclass(frozen=True)
class IterSmooth(Strategy):
    """Threshold decoding whose masked positions are fed e_mask + w Σ_v p(v) e(v).

        w = min(first + growth * t, weight);   decode c >= max(1 - growth * t, threshold)

    SPD softens decoded positions and needs a model trained for it. This softens masked ones and
    needs none, but pays a product over the whole vocabulary at each step. Here t counts the steps
    of a block; the published code counts those of the sequence. So a block does not depend on how
    much was written before it.

    Attributes:
        threshold: confidence from which a position is decoded in the end.
        weight: largest share of the expectation.
        first: share at the first step.
        growth: by how much the share grows and the bound falls at each step.
    """

    name: ClassVar[str] = "iter_smooth"
    default_threshold: ClassVar[float] = 0.9

    threshold: Number = number(high=1)
    weight: Number = number(0.3)
    first: Number = number(0.15)
    growth: Number = number(0.02)

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]; raises `InputError` where no embeddings can be mixed."""
        if view.embed is None:
            raise InputError(
                "strategy `iter_smooth` feeds mixtures of embeddings and was given none"
            )
        predicted = predict(view, output)
        steps = view.step[:, None].float()  # [B, 1]
        threshold = (1 - self.growth * steps).clamp(min=self.threshold)
        promoted = above(view.masked, predicted.confidence, threshold)

        table = view.embed(
            torch.arange(output.probs.shape[-1], device=view.tokens.device)
        )  # [V, D]
        expected = output.probs.to(table.dtype) @ table  # [B, L, D]
        share = (self.first + self.growth * steps).clamp(max=self.weight)
        softened = table[view.mask_token_id] + share[..., None].to(table.dtype) * expected
        hard = view.embed(torch.where(promoted, predicted.tokens, view.tokens))
        masked = view.masked & ~promoted
        embeds = torch.where(masked[..., None], softened, hard)
        decision = Decision(
            predicted.tokens, promoted, embeds=embeds, confidence=predicted.confidence
        )
        return decision, state
