"""Lookahead parallel decoding: one forward tries several next steps of a block (LoPA)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dmax.baselines.selection import ranks
from dmax.decoding.block import Decision, Output, State, View
from dmax.decoding.strategy import whole
from dmax.decoding.threshold import ThresholdDecoding


@dataclass(frozen=True)
class Lookahead(ThresholdDecoding):
    """Threshold decoding with branches (arXiv 2512.16229).

    After each step of the base rule, branch 0 is the block as it stands. Branch j also decodes the
    j-th surest of the remaining masks. The next forward evaluates them all. The branch whose masks
    are surest on average goes on, with the logits it got; one without masks counts as 1. Branches
    share the committed prefix and do not see each other.

    `num_forwards` counts the branches of a step as one forward, as the source does;
    `num_positions` counts them all.

    Attributes:
        threshold: of the base rule.
        num_branches: branches evaluated at once, with the base rule's own.
    """

    name: ClassVar[str] = "lopa"
    default_threshold: ClassVar[float] = 0.9  # the source's

    num_branches: int = whole(2, low=1, high=64)

    def open(self, view: View) -> State:
        """What the base rule remembers, and the last prediction of every position."""
        prediction = {
            "tokens": torch.zeros_like(view.tokens),
            "probability": torch.zeros_like(view.masked, dtype=torch.float32),
        }
        return super().open(view) | prediction

    def branches(self, view: View, state: State) -> Tensor:
        """Token ids [B, num_branches, L]: branch j decodes the j-th surest mask."""
        decoded = self._decoded(view, state)
        return torch.where(decoded, state["tokens"][:, None], view.tokens[:, None])

    def _decoded(self, view: View, state: State) -> Tensor:
        """[B, num_branches, L] bool, the mask that each branch decodes, if one is left for it."""
        rank = ranks(view.masked, state["probability"])[:, None]  # [B, 1, L]
        branch = torch.arange(self.num_branches, device=rank.device)[:, None]  # [num_branches, 1]
        return view.masked[:, None] & (rank == branch - 1)

    def step(self, view: View, output: Output, state: State) -> tuple[Decision, State]:
        """Choose the best branch, then take a step of the base rule from there."""
        tried = view
        if len(output.top(1).ids) > len(view.tokens):
            tokens = self.branches(view, state)
            masked = view.masked[:, None] & ~self._decoded(view, state)
            best = best_branch(masked, output.top(1).confidence.view(masked.shape))  # [B]
            block = torch.arange(len(best), device=best.device)
            tried = replace(view, tokens=tokens[block, best], masked=masked[block, best])
            row = block * self.num_branches + best
            output = Output(output.raw[row], view.mask_token_id)
        decision, base_state = super().step(tried, output, state)
        was_tried = view.masked & ~tried.masked
        decision = replace(
            decision,
            tokens=torch.where(was_tried, tried.tokens, decision.tokens),
            promote=decision.promote | was_tried,
        )
        probability = output.top(1).confidence
        return decision, base_state | {"tokens": decision.tokens, "probability": probability}


def best_branch(masked: Tensor, confidence: Tensor) -> Tensor:
    """[B] int64, which of R branches has the surest masks on average; ties go to the first.

    Args:
        masked: [B, R, L] bool.
        confidence: [B, R, L] float32, probability of the best token other than MASK.
    """
    mean = (confidence * masked).sum(dim=-1) / masked.sum(dim=-1).clamp(min=1)
    return torch.where(masked.any(dim=-1), mean, 1.0).argmax(dim=1)
