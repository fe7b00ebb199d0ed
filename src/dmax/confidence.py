"""From logits to the most probable tokens and their probabilities, under the rules that decoding lives by.

MASK is never a candidate, but the probability the model gives it counts against all others (A9), as
in the published
code: a position that would rather stay masked is not confident. Infinite logits become the largest
    finite ones: +inf
still wins, and a position where all are -inf turns uniform. V vocabulary, k candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max / 4
"""What infinite logits are clamped to: differences of two of them stay finite."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The best tokens of every position.

    Attributes:
        ids: [..., k] int64, most probable tokens other than MASK, best first, ties to the lowest
            id.
        probs: [..., k] float32 (float64 of float64 logits), their softmax probabilities, MASK's
            share included.
        broken: [...] bool, the position's logits held a NaN; its ids and probabilities mean
            nothing.
    """

    ids: Tensor
    probs: Tensor
    broken: Tensor

    @property
    def tokens(self) -> Tensor:
        """[...] int64, the best token of every position."""
        return self.ids[..., 0]

    @property
    def confidence(self) -> Tensor:
        """[...] float32, its probability."""
        return self.probs[..., 0]


CACHED = 2**17
"""Logits that a CPU works on at once: they and their softmax stay in its cache, and in memory that is used again."""


def candidates(logits: Tensor, k: int, mask_token_id: int) -> Candidates:
    """The k most probable tokens of logits [..., V], at most V - 1, in as few passes over them as can be."""
    rows = max(1, CACHED // logits.shape[-1])
    if logits.device.type != "cpu" or logits.numel() <= rows * logits.shape[-1]:
        return _candidates(logits, k, mask_token_id)
    parts = [_candidates(part, k, mask_token_id) for part in logits.flatten(0, -2).split(rows)]
    ids, probs, broken = (
        torch.cat([getattr(part, name) for part in parts]) for name in Candidates.__slots__
    )
    shape = logits.shape[:-1]
    return Candidates(ids.view(*shape, -1), probs.view(*shape, -1), broken.view(shape))


def _candidates(logits: Tensor, k: int, mask_token_id: int) -> Candidates:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp(
        -LARGEST, LARGEST
    )  # a NaN stays
    shares = wide.softmax(dim=-1, dtype=precision(logits))
    wide[..., mask_token_id].fill_(float("-inf"))  # our own copy since the clamp
    ids = take_best(wide, min(k, wide.shape[-1] - 1))[1]
    probs = shares.gather(-1, ids).to(wide.dtype)
    return Candidates(ids, probs, probs[..., 0].isnan())


def precision(logits: Tensor) -> torch.dtype:
    """What softmax is computed in: float32 for logits of 16 bits, else float64 where the device has it.

    The confidence is fed back; with exact logits its own rounding would be the largest error of a
    step.
    """
    return (
        torch.float32 if logits.dtype.itemsize < 4 or logits.device.type == "mps" else torch.float64
    )


def take_best(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of [..., M] and where they stood, best first; all but the last become -inf.

    Ties go to the lowest index, which `torch.topk` does not promise. A row with a NaN gives indices
    in range.
    """
    if k == 1:
        return values.max(dim=-1, keepdim=True)
    best = []
    where = []
    for taken in range(1, k + 1):
        value, index = values.max(dim=-1, keepdim=True)  # the first of several maxima
        best.append(value)
        where.append(index)
        if taken < k:
            values.scatter_(-1, index, float("-inf"))
    return torch.cat(best, dim=-1), torch.cat(where, dim=-1)
