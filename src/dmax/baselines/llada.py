"""LLaDA's low-confidence remasking on a fixed schedule (arXiv 2502.09992): best quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.baselines import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.strategy import Strategy, whole


@dataclass(frozen=True)
class FixedSchedule(Strategy):
    """Decode the k_t most confident positions at step t; nothing is revised.

    All k_t are fixed when the block opens: m masks over S steps are m // S a step, and one more in
    the first m mod S of them.

    Attributes:
        steps: S, forwards for a full block; None: one token a step. A block that begins with the
            end of the prompt takes as many.
    """

    name: ClassVar[str] = "llada"

    steps: int | None = whole(None, low=1, optional=True)

    def open(self, view: View) -> State:
        """How many positions there are to decode."""
        return {"masks": view.masked.sum(dim=1)}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]."""
        steps = self.steps or view.masked.shape[1]
        count = state["masks"] // steps + (view.step < state["masks"] % steps)
        predicted = predict(view, output)
        promoted = selection.top(view.masked, predicted.confidence, count)
        return Decision(predicted.tokens, promoted, confidence=predicted.confidence), state
