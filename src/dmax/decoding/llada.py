"""LLaDA's low-confidence remasking on a fixed schedule (arXiv 2502.09992), the reference for quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.decoding import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.settings import Configured
from dmax.params import check_number


@dataclass(frozen=True, slots=True)
class FixedSchedule(Configured):
    """Decode the k_t most confident positions at step t, k_t fixed when the block opens; nothing is revised.

    m masks over S steps: m // S a step, one more in the first m mod S of them.

    Attributes:
        steps: S, forwards for a full block; None: one token a step. The prompt's tail shortens
            nothing.
    """

    name: ClassVar[str] = "llada"

    steps: int | None = None

    def __post_init__(self) -> None:
        """Raises `InputError` for no steps."""
        check_number("steps", self.steps, low=1, whole=True, optional=True)

    def open(self, view: View) -> State:
        """How many positions there are to decode."""
        return {"masks": view.masked.sum(dim=1)}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions."""
        steps = self.steps or view.masked.shape[1]
        count = state["masks"] // steps + (view.step < state["masks"] % steps)
        prediction = predict(view, output)
        commit = selection.top(view.masked, prediction.confidence, count)
        return Decision(prediction.tokens, commit, confidence=prediction.confidence), state
