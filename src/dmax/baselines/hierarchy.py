"""Hierarchy-dLLM: divide and conquer over runs of masks (OpenReview ZsIQUjQtdW)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.baselines import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.selection import above
from dmax.decoding.strategy import Number, Strategy, number


@dataclass(frozen=True)
class HierarchyDecoding(Strategy):
    """Decode what is sure, and the best position of every run of masks that is at least plausible.

    A token in the middle of a run splits it. So positions that are far apart are decoded together,
    and those depend on each other least.

    Attributes:
        threshold: confidence from which any position is decoded.
        low: confidence from which the best position of its run is decoded.
    """

    name: ClassVar[str] = "hierarchy"
    default_threshold: ClassVar[float] = 0.9  # of the published scripts, as is `low`

    threshold: Number = number(high=1)
    low: Number = number(0.3, high=1)

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]."""
        predicted = predict(view, output)
        confidence = predicted.confidence
        best_of_runs = selection.run_maxima(view.masked, confidence) & (confidence >= self.low)
        promoted = above(view.masked, confidence, self.threshold) | best_of_runs
        return Decision(predicted.tokens, promoted, confidence=confidence), state
