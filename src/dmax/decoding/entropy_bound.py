"""Entropy-bounded decoding: as many positions as together leave little to be wrong about (arXiv 2505.24857)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.decoding import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.settings import Configured
from dmax.params import check_number


@dataclass(frozen=True, slots=True)
class EntropyBound(Configured):
    """Decode the least uncertain positions while the entropies of all but the most uncertain sum to `bound` at most.

    Attributes:
        bound: in nats; 0 decodes one position a step unless others are certain.
    """

    name: ClassVar[str] = "entropy_bound"

    bound: float = 0.1

    def __post_init__(self) -> None:
        """Raises `InputError` for a negative bound."""
        check_number("bound", self.bound, low=0)

    def open(self, view: View) -> State:
        """Nothing to remember."""
        return {}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions."""
        prediction = predict(view, output)
        commit = selection.within_entropy(view.masked, selection.entropy(output.logits), self.bound)
        return Decision(prediction.tokens, commit, confidence=prediction.confidence), state
