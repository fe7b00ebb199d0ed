"""From hidden states to losses and predictions, without the logits of all positions at once.

With 157,184 tokens in the vocabulary, the logits of one sequence of 2,048 positions take 1.3 GB in
float32, and a loss over them four times as much. So the rows that matter go through the output
layer in chunks, and backward computes each chunk anew.

Shapes: B sequences of L positions, N rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dmax.training.rollout import draw, pick

IGNORE = -100
"""The label of positions without loss."""
CHUNK = 2**26
"""Logits of a chunk: 256 MiB in float32."""


@dataclass(frozen=True, slots=True)
class States:
    """What a forward says about its first positions, before the output layer where that is linear.

    Attributes:
        values: [B, L, D] hidden states; or [B, L, V] logits, of a model whose output layer does
            more than multiply.
        head: makes logits [..., V] of rows of `values`.
        vocab_size: V.
    """

    values: Tensor
    head: Callable[[Tensor], Tensor]
    vocab_size: int

    @classmethod
    def of(cls, model: Any, length: int, **inputs: Any) -> States:
        """The states of the first `length` positions of a forward; no others meet the head."""
        vocab_size = model.config.vocab_size
        if getattr(model, "has_linear_head", False):
            hidden = model.base_model(**inputs)[0]
            return cls(hidden[:, :length], model.get_output_embeddings(), vocab_size)
        logits = model(**inputs, logits_to_keep=slice(0, length)).logits
        return cls(logits, _as_they_are, vocab_size)

    def logits(self) -> Tensor:
        """[B, L, V], all of them at once."""
        return self.head(self.values)


def _as_they_are(logits: Tensor) -> Tensor:
    return logits


class Scores(NamedTuple):
    """Losses of a stream, and its predictions where they were asked for.

    Attributes:
        losses: [B, L] float32 (float64 for float64 states), -log p(label) with gradient; 0 where
            there is no label.
        tokens: [B, L] int64, the predicted tokens, never MASK. At positions that have neither a
            label nor a prediction they mean nothing.
        confidence: [B, L], the probability of each predicted token.
    """

    losses: Tensor
    tokens: Tensor
    confidence: Tensor


def score(
    states: States,
    labels: Tensor,
    predicts: Tensor | None = None,
    *,
    mask_token_id: int = -1,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    chunk: int = CHUNK,
) -> Scores:
    """The cross-entropy of labelled positions, and predictions where asked for, in one pass.

    Args:
        states: of B sequences of L positions.
        labels: [B, L] int64, the clean tokens, or `IGNORE`.
        predicts: [B, L] bool, where to predict a token too; None: nowhere.
        mask_token_id: MASK, which is never predicted.
        temperature: of the predictions; 0 takes the most probable tokens, as `pick` does.
        generator: random source of the predictions.
        chunk: how many logits there may be at once.
    """
    chosen = labels != IGNORE
    if predicts is not None:
        chosen = chosen | predicts
    rows = states.values[chosen]  # [N, D or V]
    targets = labels[chosen]  # [N]
    draws = draw(targets.shape, generator, rows.device) if temperature else None

    def score_rows(part: slice) -> tuple[Tensor, ...]:
        logits = states.head(rows[part])
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(exact, targets[part], ignore_index=IGNORE, reduction="none")
        if predicts is None:
            return (losses,)
        drawn = None if draws is None else draws[part]
        # Last: backward computes a chunk anew only as far as it needs to, and never needs this.
        return losses, *pick(logits.detach(), mask_token_id, temperature, drawn)

    losses, *predicted = in_chunks(score_rows, len(rows), states.vocab_size, chunk)
    everywhere = losses.new_zeros(labels.shape).masked_scatter(chosen, losses)
    if not predicted:
        return Scores(everywhere, labels, torch.zeros_like(everywhere))
    tokens = labels.masked_scatter(chosen, predicted[0])
    confidence = torch.zeros_like(everywhere).masked_scatter(chosen, predicted[1])
    return Scores(everywhere, tokens, confidence)


def in_chunks(
    function: Callable[[slice], tuple[Tensor, ...]],
    num_rows: int,
    vocab_size: int,
    chunk: int = CHUNK,
) -> tuple[Tensor, ...]:
    """What a function makes of all rows, without the logits of all rows at once.

    Where there are several chunks, backward computes each of them anew.

    Args:
        function: takes which rows of N, and returns tensors [n, …] of them.
        num_rows: N.
        vocab_size: logits of a row.
        chunk: how many logits there may be at once.

    Returns:
        The same tensors [N, …].
    """
    size = max(1, chunk // vocab_size)
    parts = [slice(start, start + size) for start in range(0, max(1, num_rows), size)]
    if len(parts) > 1 and torch.is_grad_enabled():
        done = [checkpoint(function, part, use_reentrant=False) for part in parts]
    else:
        done = [function(part) for part in parts]
    return tuple(torch.cat(tensors) for tensors in zip(*done, strict=True))
