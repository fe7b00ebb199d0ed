"""One token a forward, from left to right: what any parallel decoding is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.decoding.block import Decision, Output, State, View, leftmost, predict
from dmax.decoding.strategy import Strategy


@dataclass(frozen=True)
class Autoregressive(Strategy):
    """Decode the leftmost mask.

    With `block_length=1` every token is decoded on clean keys and values only.
    """

    name: ClassVar[str] = "autoregressive"

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]."""
        predicted = predict(view, output)
        promoted = leftmost(view.masked)
        return Decision(predicted.tokens, promoted, confidence=predicted.confidence), state
