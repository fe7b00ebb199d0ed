"""Threshold decoding of LLaDA-2.0 (arXiv 2512.15745, section 5.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.selection import above
from dmax.decoding.strategy import Number, Strategy, number


@dataclass(frozen=True)
class ThresholdDecoding(Strategy):
    """Decode every mask whose confidence reaches the threshold, or the best one; never revise."""

    name: ClassVar[str] = "threshold"
    default_threshold: ClassVar[float] = 0.95  # LLaDA-2.0's

    threshold: Number = number(high=1)

    def open(self, view: View) -> State:
        """The confidence that each position had when it was decoded, for events and traces."""
        return {"confidence": torch.zeros_like(view.masked, dtype=torch.float32)}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]; a block is done once no mask is left."""
        predicted = predict(view, output)
        promoted = above(view.masked, predicted.confidence, self.threshold, view.must_progress)
        confidence = torch.where(view.masked, predicted.confidence, state["confidence"])
        decision = Decision(predicted.tokens, promoted, confidence=confidence)
        return decision, {"confidence": confidence}
