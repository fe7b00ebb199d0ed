"""Entropy-bounded decoding: positions that together leave little in doubt (arXiv 2505.24857)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.baselines import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.strategy import Number, Strategy, number


@dataclass(frozen=True)
class EntropyBound(Strategy):
    """Decode the surest positions while the entropies of all but the last sum to at most `bound`.

    Attributes:
        bound: in nats; 0 decodes one position a step unless others are certain.
    """

    name: ClassVar[str] = "entropy_bound"

    bound: Number = number(0.1)

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]."""
        predicted = predict(view, output)
        entropy = selection.entropy(output.logits)
        promoted = selection.within_entropy(view.masked, entropy, self.bound)
        return Decision(predicted.tokens, promoted, confidence=predicted.confidence), state
