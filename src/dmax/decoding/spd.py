"""Soft parallel decoding (DMax, arXiv 2604.08302, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dmax.decoding import feed, selection, stop
from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.settings import Configured


@dataclass(frozen=True, slots=True)
class SoftParallelDecoding(Configured):
    """Decode a confident prefix, keep everything decoded open to revision, feed it back as blends, stop when stable.

    With y_j the top-1 token of position j and π_j its probability, the next forward sees

        h_j = e_mask                                  at masked positions                              (7)
        h̃_j = π_j e(y_j) + (1 - π_j) e_mask           at decoded positions, the prompt's tail excepted (8, 9)
        h_j = h̃_j / ‖h̃_j‖ · (π_j ‖e(y_j)‖ + (1 - π_j) ‖e_mask‖)                                       (10)

    The first forward of a block is hard (A12). Needs a model trained for it
    (`dmax.training.objectives.oput_loss`).
    """

    name: ClassVar[str] = "spd"
    default_threshold: ClassVar[float] = 0.5  # the paper's

    threshold: float
    stop_confidence: float
    top_k: int
    prefix_only: bool
    soft_inputs: bool
    renormalize: bool
    stop_on_confidence: bool
    stop_on_consistency: bool

    def open(self, view: View) -> State:
        """Nothing to remember: all that passes from step to step is the block and its soft inputs."""
        return {}

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step for [B, L] positions."""
        # 1. Predict every position anew.
        prediction = predict(view, output, self.top_k)
        tokens = prediction.tokens
        confidence = prediction.confidence

        # 2. Promote masked positions: the confident prefix, or the leftmost one.
        select = selection.prefix if self.prefix_only else selection.above
        promoted = select(view.masked, confidence, self.threshold, view.forced)

        # 3. Revise every position decoded earlier, however unsure the new token.
        decoded = view.active > view.masked
        revised = decoded & (tokens != view.tokens)

        # 4. Converged? A promotion counts as a change, so no mask may have been left before.
        masked = view.masked > promoted
        if self.stop_on_consistency:
            done = stop.consistent(view.masked, revised)
        else:
            done = torch.zeros_like(view.step, dtype=torch.bool)
        if self.stop_on_confidence:
            done = done | stop.confident(view.active, masked, confidence, self.stop_confidence)

        # 5. Feed all decoded positions, the new ones included, as blends.
        soft = None
        if self.soft_inputs:
            soft = feed.soft_feed(view.active > masked, prediction, renormalize=self.renormalize)
        return Decision(
            tokens, promoted, edit=decoded, soft=soft, done=done, confidence=confidence
        ), state
