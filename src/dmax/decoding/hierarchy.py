"""Hierarchy-dLLM: divide and conquer over runs of masks (OpenReview ZsIQUjQtdW)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.decoding import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.settings import Configured
from dmax.params import check_number


@dataclass(frozen=True, slots=True)
class HierarchyDecoding(Configured):
    """Decode what is sure, and the best position of every run of masks that is at least plausible.

    A token in the middle of a run splits it, so that positions far apart, which depend on each
    other least, are decoded together.

    Attributes:
        threshold: confidence from which any position is decoded.
        low: confidence from which the best position of its run is.
    """

    name: ClassVar[str] = "hierarchy"
    default_threshold: ClassVar[float] = 0.9  # of the published scripts, as is `low`

    threshold: float
    low: float = 0.3

    def __post_init__(self) -> None:
        """Raises `InputError` for a confidence outside [0, 1]."""
        check_number("low", self.low, low=0, high=1)

    def open(self, view: View) -> State:
        """Nothing to remember."""
        return {}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions."""
        prediction = predict(view, output)
        confidence = prediction.confidence
        commit = selection.above(view.masked, confidence, self.threshold)
        commit = commit | (selection.run_maxima(view.masked, confidence) & (confidence >= self.low))
        return Decision(prediction.tokens, commit, confidence=confidence), state
