"""dParallel's decoding rule (arXiv 2509.26488), made for models trained to be certain early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dmax.decoding import selection
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.settings import Configured


@dataclass(frozen=True, slots=True)
class DParallel(Configured):
    """Decode every position whose entropy is at most `threshold` nats, and always the least uncertain one."""

    name: ClassVar[str] = "dparallel"
    default_threshold: ClassVar[float] = 0.5  # nats; 0.45 for some of the paper's tasks

    threshold: float

    def open(self, view: View) -> State:
        """Nothing to remember."""
        return {}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions."""
        prediction = predict(view, output)
        entropy = selection.entropy(output.logits)
        commit = view.masked & (entropy <= self.threshold)
        commit = commit | selection.top(view.masked, -entropy, torch.ones_like(view.step))
        return Decision(prediction.tokens, commit, confidence=prediction.confidence), state
