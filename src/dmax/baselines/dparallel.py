"""dParallel's decoding rule (arXiv 2509.26488), for models trained to be certain early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dmax.baselines import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.selection import most_confident
from dmax.decoding.strategy import Number, Strategy, number


@dataclass(frozen=True)
class DParallel(Strategy):
    """Decode every position of at most `threshold` nats of entropy, and always the surest one."""

    name: ClassVar[str] = "dparallel"
    default_threshold: ClassVar[float] = 0.5  # nats; 0.45 for some of the paper's tasks

    threshold: Number = number()

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]."""
        predicted = predict(view, output)
        entropy = selection.entropy(output.logits)
        surest = most_confident(view.masked, -entropy)
        promoted = (view.masked & (entropy <= self.threshold)) | surest
        return Decision(predicted.tokens, promoted, confidence=predicted.confidence), state
