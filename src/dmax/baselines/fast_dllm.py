"""Fast-dLLM's two rules for which positions to decode together (arXiv 2505.22618)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.baselines import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.selection import above
from dmax.decoding.strategy import Number, Strategy, number


@dataclass(frozen=True)
class FastDLLM(Strategy):
    """Decode every position with confidence c >= threshold, and always the most confident one."""

    name: ClassVar[str] = "fast_dllm"
    default_threshold: ClassVar[float] = 0.9  # the paper's

    threshold: Number = number(high=1)

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]."""
        predicted = predict(view, output)
        promoted = above(view.masked, predicted.confidence, self.threshold)
        return Decision(predicted.tokens, promoted, confidence=predicted.confidence), state


@dataclass(frozen=True)
class FastDLLMFactor(Strategy):
    """Decode the largest n such that the n-th best position has (n + 1) (1 - c_n) <= factor.

    This is the rule as the paper states it. Its published loop also decodes the one position that
    fails when that is the last.
    """

    name: ClassVar[str] = "fast_dllm_factor"

    factor: Number = number(1.0)

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]."""
        predicted = predict(view, output)
        promoted = selection.within_error(view.masked, predicted.confidence, self.factor)
        return Decision(predicted.tokens, promoted, confidence=predicted.confidence), state
