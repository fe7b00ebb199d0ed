"""IterSmooth: masked positions carry what the model expects of them into the next forward (arXiv 2510.08666)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dmax.decoding import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.settings import Configured
from dmax.errors import InputError
from dmax.params import check_number


@dataclass(frozen=True, slots=True)
class IterSmooth(Configured):
    """Threshold decoding whose masked positions are fed e_mask + w Σ_v p(v) e(v), w growing from step to step.

        w = min(first + growth · t, weight);   decode c >= max(1 - growth · t, threshold)

    SPD softens decoded positions and needs a model trained for it; this softens masked ones and
    needs none, but pays a product over the whole vocabulary each step. t counts the steps of a
    block, where the published code counts those of the sequence: a block then does not depend on
    how much was written before it.

    Attributes:
        threshold: confidence from which a position is decoded in the end.
        weight: largest share of the expectation.
        first: share at the first step.
        growth: of the share, and fall of the bound, per step.
    """

    name: ClassVar[str] = "iter_smooth"
    default_threshold: ClassVar[float] = 0.9

    threshold: float
    weight: float = 0.3
    first: float = 0.15
    growth: float = 0.02

    def __post_init__(self) -> None:
        """Raises `InputError` for a negative setting."""
        for name in ("weight", "first", "growth"):
            check_number(name, getattr(self, name), low=0)

    def open(self, view: View) -> State:
        """Nothing to remember."""
        return {}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions."""
        if view.embed is None:
            raise InputError(
                "strategy `iter_smooth` feeds mixtures of embeddings and was given none"
            )
        # [B, 1]
        prediction = predict(view, output)
        steps = view.step[:, None].float()
        threshold = (1 - self.growth * steps).clamp(min=self.threshold)
        commit = selection.above(view.masked, prediction.confidence, threshold)
        masked = view.masked & ~commit

        table = view.embed(
            torch.arange(output.probs.shape[-1], device=view.tokens.device)
        )  # [V, D]
        expected = output.probs.to(table.dtype) @ table  # [B, L, D]
        share = (
            (self.first + self.growth * steps).clamp(max=self.weight)[..., None].to(table.dtype)
        )  # [B, 1, 1]
        hard = view.embed(torch.where(commit, prediction.tokens, view.tokens))
        mask_embed = table[view.mask_token_id]
        embeds = torch.where(masked[..., None], mask_embed + share * expected, hard)
        return Decision(
            prediction.tokens, commit, embeds=embeds, confidence=prediction.confidence
        ), state
