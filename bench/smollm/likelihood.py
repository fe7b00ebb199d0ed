"""How likely an autoregressive model finds what another model wrote: a measure without answers.

Tokens that are decided together may not fit together. The autoregressive original reads a text from
left to right, and its cross-entropy rises wherever a token does not follow from those before it,
whether the answer is right or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmax.training.vocabulary import IGNORE


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """What a causal model says of some texts.

    Attributes:
        nats: -log p of all their tokens, added up.
        tokens: how many there are.
    """

    nats: float
    tokens: int

    @property
    def per_token(self) -> float:
        """Mean nats of a token; 0 where there is none."""
        return self.nats / self.tokens if self.tokens else 0.0


@torch.no_grad()
def cross_entropy(
    model: Any, texts: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16
) -> CrossEntropy:
    """-log p(written | prompt) under a causal model, added up over texts.

    Args:
        model: of transformers, whose logits at a position predict the next token.
        texts: the ids of each prompt, of at least one token, and of what was written after it.
        batch_size: texts that are read together.
    """
    nats = 0.0
    tokens = 0
    by_length = sorted(texts, key=lambda text: len(text[0]) + len(text[1]))
    for start in range(0, len(by_length), batch_size):
        ids, labels = _padded(by_length[start : start + batch_size])
        logits = model(input_ids=ids.to(model.device)).logits.float()  # [B, L, V]
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2),
            labels[:, 1:].to(logits.device),
            ignore_index=IGNORE,
            reduction="sum",
        )
        nats += losses.item()
        tokens += int((labels[:, 1:] != IGNORE).sum())
    return CrossEntropy(nats, tokens)


def _padded(texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """`input_ids` and `labels`, [B, L] int64; padding stands last, where no token sees it."""
    length = max(len(prompt) + len(written) for prompt, written in texts)
    ids = torch.zeros(len(texts), length, dtype=torch.int64)
    labels = torch.full((len(texts), length), IGNORE)
    for row, (prompt, written) in enumerate(texts):
        end = len(prompt) + len(written)
        ids[row, :end] = torch.tensor([*prompt, *written])
        labels[row, len(prompt) : end] = torch.tensor(written, dtype=torch.int64)
    return ids, labels
