"""Lookahead parallel decoding: several versions of a block in one forward, the most promising goes on (LoPA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dmax.decoding.block import Output, View
from dmax.decoding.threshold import ThresholdDecoding
from dmax.params import check_number


@dataclass(frozen=True, slots=True)
class Lookahead(ThresholdDecoding):
    """Threshold decoding with branches (arXiv 2512.16229).

    After each step of the base rule, version 0 is the block as it stands, and version j decodes the
    j-th surest of the remaining masks besides. The next forward evaluates them all; the one whose
    masks are surest on average goes on (all decoded: 1), with the logits it got. Versions share the
    committed prefix and do not see each other.

    `num_forwards` counts the versions of a step as one forward, as the source does; `num_positions`
    counts them all.

    Attributes:
        threshold: of the base rule.
        num_branches: versions evaluated at once, the base rule's included.
    """

    name: ClassVar[str] = "lopa"
    default_threshold: ClassVar[float] = 0.9  # the source's

    num_branches: int = 2

    def __post_init__(self) -> None:
        """Raises `InputError` for a setting out of range."""
        check_number("num_branches", self.num_branches, low=1, high=64, whole=True)

    def choose(self, view: View, output: Output) -> Tensor:
        """The version whose masks have the highest mean confidence, [B] int64; ties go to the first."""
        masked = view.masked
        confidence = best_probability(output)
        mean = (confidence * masked).sum(dim=1) / masked.sum(dim=1).clamp(min=1)
        score = torch.where(masked.any(dim=1), mean, 1.0)
        return score.view(-1, self.num_branches).argmax(dim=1)

    def branch(self, masked: Tensor, output: Output) -> Tensor:
        """[B, R - 1, L] bool: the first to (R - 1)-th most confident of `masked` [B, L], one each."""
        confidence = torch.where(masked, best_probability(output), float("-inf"))
        order = confidence.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        which = torch.arange(self.num_branches - 1, device=order.device)
        return masked[:, None] & (rank[:, None] == which[None, :, None])


def best_probability(output: Output) -> Tensor:
    """Probability [B, L] of the best token other than MASK."""
    return output.top(1).probs[..., 0]
