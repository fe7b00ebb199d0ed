"""From logits to the most probable tokens and their probabilities, under the rules of decoding.

MASK is never a candidate. But the probability that the model gives it counts against all others, as
in the published code (A9 in docs/paper.md): a position that would rather stay masked is not
confident. Infinite logits become the largest finite ones: +inf still wins, and a position where all
are -inf becomes uniform.

Shapes: V vocabulary, k candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max / 4
"""What infinite logits are clamped to: the difference of two of them stays finite."""

CACHED = 2**17
"""Logits that a CPU works on at once, so that they and their softmax stay in its cache."""


class Candidates(NamedTuple):
    """The most probable tokens of every position.

    Attributes:
        ids: [..., k] int64, tokens other than MASK, best first; ties go to the lowest id.
        probs: [..., k] float32 (float64 for float64 logits), their softmax probabilities; MASK
            takes part in the softmax.
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

    def view(self, *shape: int) -> Candidates:
        """The same candidates with other leading dimensions, such as [B, L, k] for [N, k]."""
        ids = self.ids.view(*shape, -1)
        probs = self.probs.view(*shape, -1)
        return Candidates(ids, probs, self.broken.view(shape))


def concatenate(parts: list[Candidates]) -> Candidates:
    """The candidates of several groups of positions, one group after the other."""
    return Candidates(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def candidates(logits: Tensor, k: int, mask_token_id: int) -> Candidates:
    """The k most probable tokens of logits [..., V]; at most V - 1 are given."""
    if logits.device.type != "cpu":
        return _candidates(logits, k, mask_token_id)
    rows = max(1, CACHED // logits.shape[-1])
    parts = logits.flatten(0, -2).split(rows)
    found = concatenate([_candidates(part, k, mask_token_id) for part in parts])
    return found.view(*logits.shape[:-1])


def _candidates(logits: Tensor, k: int, mask_token_id: int) -> Candidates:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    finite = logits.to(dtype).clamp(-LARGEST, LARGEST)  # a copy of our own; a NaN stays
    shares = finite.softmax(dim=-1, dtype=precision(logits))
    finite[..., mask_token_id].fill_(float("-inf"))
    _, ids = take_best(finite, min(k, finite.shape[-1] - 1))
    probs = shares.gather(-1, ids).to(dtype)
    return Candidates(ids, probs, probs[..., 0].isnan())


def precision(logits: Tensor) -> torch.dtype:
    """The dtype of the softmax: float32 for logits of 16 bits, else float64 where there is one.

    The confidence is fed back into the model. With exact logits, rounding it would be the largest
    error of a step.
    """
    has_few_bits = logits.dtype.itemsize < 4
    return torch.float32 if has_few_bits or logits.device.type == "mps" else torch.float64


def take_best(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of [..., M], best first, and their indices.

    Ties go to the lowest index, which `torch.topk` does not promise. A row with a NaN gives indices
    in range. With k > 1, `values` is overwritten.
    """
    if k == 1:
        return values.max(dim=-1, keepdim=True)
    best = []
    where = []
    for _ in range(k):
        value, index = values.max(dim=-1, keepdim=True)  # the first of several maxima
        best.append(value)
        where.append(index)
        values.scatter_(-1, index, float("-inf"))
    return torch.cat(best, dim=-1), torch.cat(where, dim=-1)
