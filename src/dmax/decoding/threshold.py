"""Threshold decoding of LLaDA-2.0 (arXiv 2512.15745, section 5.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dmax.decoding import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.settings import Configured


@dataclass(frozen=True, slots=True)
class ThresholdDecoding(Configured):
    """Decode every masked position whose confidence reaches the threshold, at least the best one; never revise."""

    name: ClassVar[str] = "threshold"
    default_threshold: ClassVar[float] = 0.95  # LLaDA-2.0's

    threshold: float

    def open(self, view: View) -> State:
        """The confidence each position had when it was decoded, for events and traces."""
        return {"confidence": torch.zeros_like(view.masked, dtype=torch.float32)}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions; the block is done once no mask is left."""
        prediction = predict(view, output)
        commit = selection.above(view.masked, prediction.confidence, self.threshold, view.forced)
        confidence = torch.where(view.masked, prediction.confidence, state["confidence"])
        return Decision(prediction.tokens, commit, confidence=confidence), {
            "confidence": confidence
        }
