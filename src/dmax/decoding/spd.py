"""Soft parallel decoding (DMax, arXiv 2604.08302, section 3.2): promote, revise, converge, feed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dmax.decoding.block import Decision, Output, State, View, predict
from dmax.decoding.selection import above
from dmax.decoding.strategy import Number, Strategy, number


@dataclass(frozen=True)
class SoftParallelDecoding(Strategy):
    """Decode a confident prefix, keep everything decoded open to revision, feed it back as blends.

    With y_j the most probable token of position j and π_j its probability, the next forward reads

        h_j = e_mask                                  at masked positions                    (7)
        h̃_j = π_j e(y_j) + (1 - π_j) e_mask           at decoded positions                   (8, 9)
        h_j = h̃_j / ‖h̃_j‖ · (π_j ‖e(y_j)‖ + (1 - π_j) ‖e_mask‖)                             (10)

    and the tokens themselves at the end of the prompt. The first forward of a block reads masks
    only (A12 in docs/paper.md). The model must be trained for it (`dmax.training.objectives.OPUT`).

    Attributes:
        top_k: candidates in a blend; equation 8 has one.
        threshold: confidence from which a masked position is decoded.
        stop_confidence: a block is finished when every position is at least this sure.
        prefix_only: decode the confident prefix only; off: any confident position.
        soft_inputs: feed decoded positions back as blends; off: as tokens.
        renormalize: apply equation 10.
        stop_on_confidence: the block may finish because every position is sure.
        stop_on_consistency: the block may finish because nothing changed.
    """

    name: ClassVar[str] = "spd"
    default_threshold: ClassVar[float] = 0.5  # the paper's

    top_k: int
    threshold: Number = number(high=1)
    stop_confidence: Number = number(high=1)
    prefix_only: bool = True
    soft_inputs: bool = True
    renormalize: bool = True
    stop_on_confidence: bool = True
    stop_on_consistency: bool = True

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """One step of blocks [B, L]."""
        # 1. Predict every position anew.
        predicted = predict(view, output, self.top_k)
        tokens = predicted.tokens
        confidence = predicted.confidence

        # 2. Promote masked positions: the confident prefix, or the leftmost one.
        select = prefix if self.prefix_only else above
        promoted = select(view.masked, confidence, self.threshold, view.must_progress)

        # 3. Revise every position decoded earlier, however unsure the new token.
        decoded = view.decoded
        changed = decoded & (tokens != view.tokens)

        # 4. Converged? A promotion counts as a change, so no mask may have been left before.
        masked = view.masked & ~promoted
        done = torch.zeros_like(view.step, dtype=torch.bool)
        if self.stop_on_consistency:
            done = is_consistent(view.masked, changed)
        if self.stop_on_confidence:
            done = done | is_confident(view.active, masked, confidence, self.stop_confidence)

        # 5. Feed back every decoded position as a blend, the new ones included.
        soft = predicted if self.soft_inputs else None
        decision = Decision(
            tokens, promoted, revise=decoded, soft=soft, done=done, confidence=confidence
        )
        return decision, state

    def fused(self) -> tuple[int, dict[str, bool]] | None:
        """`step` has a kernel whatever the settings are."""
        if type(self) is not SoftParallelDecoding:  # what derives from it steps in its own way
            return None
        names = ("prefix_only", "soft_inputs", "stop_on_confidence", "stop_on_consistency")
        return self.top_k, {name: getattr(self, name) for name in names}


def prefix(
    masked: Tensor, confidence: Tensor, threshold: Number, must_progress: Tensor | None = None
) -> Tensor:
    """The longest run of confident masked positions from the left, else the leftmost mask.

    The masked positions are read from left to right up to the first one below the threshold.

    Args:
        masked: [B, L] bool.
        confidence: [B, L] float32.
        threshold: one number, or [B, 1].
        must_progress: [B] bool, rows where at least one mask is decoded; None: all rows.

    Returns:
        [B, L] bool.
    """
    num_seen = masked.cumsum(dim=1)
    num_sure = (masked & (confidence >= threshold)).cumsum(dim=1)
    at_least = 1 if must_progress is None else must_progress[:, None]
    return masked & (num_seen <= num_sure.clamp(min=at_least))


def is_consistent(masked: Tensor, changed: Tensor) -> Tensor:
    """[B] bool, two steps agree: no position [B, L] is masked, none has changed (criterion 1)."""
    return ~(masked | changed).any(dim=1)


def is_confident(
    active: Tensor, masked: Tensor, confidence: Tensor, stop_confidence: Number
) -> Tensor:
    """[B] bool, every position [B, L] is decoded with at least `stop_confidence` (criterion 2).

    Unlike the published test it never holds while a mask is left (A8 in docs/paper.md).
    """
    sure = ~masked & (confidence >= stop_confidence)
    return (sure | ~active).all(dim=1)
