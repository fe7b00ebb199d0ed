"""Choices of experts that are prescribed, so that a forward reads as many as one wants: speed depends on no more.

E experts, K experts per token, L block length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class PrescribedRouter(nn.Module):
    """A router that does all its work and then has its choice replaced by rows of a table, token by token.

    Inputs longer than the table, which are prompts, go where the router itself sends them.

    Args:
        router: gives indices and weights [N, K].
        table: [tokens, K] int64 experts.
    """

    table: Tensor

    def __init__(self, router: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N, D] to expert indices [N, K] int64 and their weights [N, K]."""
        index, weights = self.router(x)
        return (self.table[: len(x)] if len(x) <= len(self.table) else index), weights


def uniform(num_experts: int, per_token: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Each token's experts drawn at random without repetition, [tokens, K]."""
    return torch.rand((tokens, num_experts), generator=generator).topk(per_token, dim=-1).indices


def pooled(
    num_experts: int,
    per_token: int,
    counts: Sequence[int],
    block_length: int,
    generator: torch.Generator,
) -> Tensor:
    """Blocks whose tokens together hit exactly `counts[b]` experts, a random set for each, [blocks L, K].

    A count is at least K and at most E and L K: the tokens take the experts of the set in turn.
    """
    turns = torch.arange(block_length * per_token).view(block_length, per_token)
    blocks = [
        torch.randperm(num_experts, generator=generator)[:count][turns % count] for count in counts
    ]
    return torch.cat(blocks)


def counts_of_mean(mean: float, num: int) -> list[int]:
    """`num` whole numbers of that mean, as nearly as can be: 69.5 gives 70, 69, 69, 70, …."""
    return [round((index + 1) * mean) - round(index * mean) for index in range(num)]


def prescribe(model: Any, distinct: float | None, blocks: int, block_length: int) -> None:
    """Prescribe the choices of all layers of a LLaDA-2.x model, in place of what was prescribed before.

    Args:
        model: its language model.
        distinct: experts that the tokens of a block hit, as a mean over layers and blocks; None:
            drawn uniformly.
        blocks: that a forward holds at most.
        block_length: L.
    """
    config = model.config
    device = model.device
    generator = torch.Generator().manual_seed(0)
    layers = [layer.mlp for layer in model.base_model.layers if hasattr(layer.mlp, "experts")]
    counts = counts_of_mean(distinct or 0.0, len(layers) * blocks)
    for number, layer in enumerate(layers):
        experts = config.num_experts
        per_token = config.num_experts_per_tok
        if distinct is None:
            table = uniform(experts, per_token, blocks * block_length, generator)
        else:
            table = pooled(
                experts, per_token, counts[number :: len(layers)], block_length, generator
            )
        router = layer.gate.router if isinstance(layer.gate, PrescribedRouter) else layer.gate
        layer.gate = PrescribedRouter(router, table.to(device))


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Distinct experts of each layer and forward, in the order in which they run."""
    found: list[int] = []

    def count(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(len(arguments[1].unique()))  # waits for the device

    layers = [
        layer.mlp.experts for layer in model.base_model.layers if hasattr(layer.mlp, "experts")
    ]
    hooks = [experts.register_forward_pre_hook(count) for experts in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
