"""Prescribed logits, and the loop output -> step -> apply without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dmax.confidence import GumbelNoise
from dmax.decoding import get_strategy
from dmax.decoding.block import Advance, Decision, Output, View, apply
from dmax.decoding.strategy import Strategy
from dmax.params import DecodingParams

V = 8
MASK = 7
EOS = 6
TABLE = torch.randn(V, 4, generator=torch.Generator().manual_seed(0))


def embed(ids: Tensor) -> Tensor:
    """[..., 4] embeddings."""
    return TABLE[ids]


def rows(values: Any) -> Tensor:
    """[B, L] bool from strings, one per row: `x` is True, anything else is False."""
    return torch.tensor([[letter == "x" for letter in row] for row in values])


def logits_of(tokens: Sequence[int], confidence: Sequence[float]) -> Tensor:
    """[1, L, V] logits whose softmax gives `tokens[i]` the probability `confidence[i]`.

    The other tokens share the rest evenly.
    """
    chosen = torch.tensor([tokens])[..., None]
    p = torch.tensor([confidence])[..., None]
    return ((1 - p) / (V - 1)).expand(-1, -1, V).scatter(-1, chosen, p).log()


def opened(
    prompt_tail: Sequence[int],
    length: int,
    batch: int = 1,
    max_steps: int | None = None,
    **options: Any,
) -> View:
    """Blocks just opened: `prompt_tail` fixed, the rest masked; a step a position by default."""
    tokens = torch.full((batch, length), MASK)
    tokens[:, : len(prompt_tail)] = torch.tensor(prompt_tail, dtype=torch.long)
    active = (torch.arange(length) >= len(prompt_tail)).expand(batch, -1)
    return View(
        tokens=tokens,
        masked=active.clone(),
        active=active,
        step=torch.zeros(batch, dtype=torch.long),
        max_steps=torch.full((batch,), length if max_steps is None else max_steps),
        mask_token_id=MASK,
        embed=embed,
        **options,
    )


def noise_of(temperatures: Sequence[float], length: int = 1, first_seed: int = 0) -> GumbelNoise:
    """The noise of blocks at their first step, with seeds of their own."""
    zeros = torch.zeros(len(temperatures), dtype=torch.long)
    return GumbelNoise(
        seeds=torch.arange(len(zeros)) + first_seed,
        temperatures=torch.tensor(temperatures),
        starts=zeros,
        steps=zeros,
        block_length=length,
    )


def after(view: View, advance: Advance) -> View:
    """The view of the next step."""
    step = view.step + 1
    return replace(view, tokens=advance.tokens, masked=advance.masked, step=step, noise=None)


@dataclass
class Step:
    view: View  # what the strategy saw
    decision: Decision
    advance: Advance


def play(
    strategy: Strategy | DecodingParams,
    logits: Callable[[int, View], Tensor],
    view: View,
    limit: int = 1000,
) -> list[Step]:
    """Decode the blocks of `view` until all are done; `logits(step, view)` plays the model."""
    if isinstance(strategy, DecodingParams):
        strategy = get_strategy(strategy)
    state = strategy.open(view)
    steps = list[Step]()
    while len(steps) < limit:
        hidden_states = embed(view.tokens) if strategy.needs_hidden_states else None
        output = Output(logits(len(steps), view), MASK, hidden_states=hidden_states)
        decision, state = strategy.step(view, output, state)
        advance = apply(view, decision)
        steps.append(Step(view, decision, advance))
        if advance.done.all():
            return steps
        view = after(view, advance)
    raise AssertionError(f"still going after {limit} steps")
