"""One token a forward, left to right: what any parallel decoding is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.decoding.block import Decision, Output, State, View, leftmost, predict
from dmax.decoding.settings import Configured


@dataclass(frozen=True, slots=True)
class Autoregressive(Configured):
    """Decode the leftmost mask. With `block_length=1` every token is decoded on clean keys and values alone."""

    name: ClassVar[str] = "autoregressive"

    def open(self, view: View) -> State:
        """Nothing to remember."""
        return {}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions."""
        prediction = predict(view, output)
        return Decision(
            prediction.tokens, leftmost(view.masked), confidence=prediction.confidence
        ), state
