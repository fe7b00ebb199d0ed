"""Fast-dLLM's two rules for which positions to decode together (arXiv 2505.22618)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.decoding import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.settings import Configured
from dmax.params import check_number


@dataclass(frozen=True, slots=True)
class FastDLLM(Configured):
    """Decode every position with c >= threshold, and always the most confident one."""

    name: ClassVar[str] = "fast_dllm"
    default_threshold: ClassVar[float] = 0.9  # the paper's

    threshold: float

    def open(self, view: View) -> State:
        """Nothing to remember."""
        return {}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions."""
        prediction = predict(view, output)
        commit = selection.above(view.masked, prediction.confidence, self.threshold)
        return Decision(prediction.tokens, commit, confidence=prediction.confidence), state


@dataclass(frozen=True, slots=True)
class FastDLLMFactor(Configured):
    """Decode the largest n such that the n-th most confident position has (n + 1) (1 - c_n) <= factor.

    The rule as the paper states it; its published loop also decodes the one position that fails
    when that is the last.
    """

    name: ClassVar[str] = "fast_dllm_factor"

    factor: float = 1.0

    def __post_init__(self) -> None:
        """Raises `InputError` for a negative factor."""
        check_number("factor", self.factor, low=0)

    def open(self, view: View) -> State:
        """Nothing to remember."""
        return {}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions."""
        prediction = predict(view, output)
        commit = selection.within_error(view.masked, prediction.confidence, self.factor)
        return Decision(prediction.tokens, commit, confidence=prediction.confidence), state
