"""Prescribed choices of experts: a random model then reads as many experts as a trained one.

The speed of a forward depends on how many experts it reads, not on which. E experts, K experts per
token, L block length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class PrescribedRouter(nn.Module):
    """A router that does all its work and then has its choice replaced, token by token.

    Inputs longer than the table, which are prompts, go where the router itself sends them.

    Args:
        router: gives expert indices and weights [N, K].
        table: [tokens, K] int64 experts.
    """

    router: Any
    table: Tensor

    def __init__(self, router: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("table", table, persistent=False)
        self._lists: dict[int, dict[str, Tensor]] = {}  # by the number of tokens

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N, D] to expert indices [N, K] int64 and their weights [N, K]."""
        chosen, weights = self.router(tokens)
        if len(tokens) <= len(self.table):
            chosen = self.table[: len(tokens)]
        return chosen, weights

    def route(self, tokens: Tensor, idle: Tensor | None, num_terms: int) -> Any:
        """The same as lists of every expert's tokens, those of the table made once."""
        routing = self.router.route(tokens, idle, num_terms)
        if len(tokens) > len(self.table):
            return routing
        if len(tokens) not in self._lists:
            chosen = self.table[: len(tokens)]
            self._lists[len(tokens)] = list_pairs(chosen, len(self.router.weight), num_terms)
        return routing._replace(**self._lists[len(tokens)])


def list_pairs(chosen: Tensor, num_experts: int, num_terms: int) -> dict[str, Tensor]:
    """A choice of experts [N, K] as the fields of a `router_triton.Routing`."""
    num_tokens, top_k = chosen.shape
    chosen_on_host = chosen.cpu()
    pairs = torch.zeros(num_experts, num_tokens * top_k, dtype=torch.long)
    counts = chosen_on_host.flatten().bincount(minlength=num_experts)
    experts = counts.nonzero()[:, 0]
    for expert in experts:
        token, rank = (chosen_on_host == expert).nonzero().unbind(dim=1)
        pairs[expert, : len(token)] = token * num_terms + rank
    active = torch.tensor([len(experts)])
    lists = {"pairs": pairs, "experts": experts, "counts": counts, "active": active}
    return {name: numbers.int().to(chosen.device) for name, numbers in lists.items()}


def prescribe(model: Any, tables: Sequence[Tensor]) -> None:
    """Prescribe the experts of a LLaDA-2.x model, with one table [tokens, K] for each MoE layer."""
    for block, table in zip(sparse_blocks(model), tables, strict=True):
        is_prescribed = isinstance(block.gate, PrescribedRouter)
        router = block.gate.router if is_prescribed else block.gate
        block.gate = PrescribedRouter(router, table.to(model.device))


def sparse_blocks(model: Any) -> list[Any]:
    """The feed-forward blocks of a LLaDA-2.x model that have experts."""
    blocks = [layer.mlp for layer in model.base_model.layers]
    return [block for block in blocks if hasattr(block, "experts")]


def distinct_experts(model: Any, num_tokens: int) -> float:
    """Experts that the first tokens of a forward are prescribed, as a mean over layers."""
    tables = [block.gate.table[:num_tokens] for block in sparse_blocks(model)]
    return sum(len(table.unique()) for table in tables) / len(tables)


def replayed(config: Any, distinct: float, num_blocks: int, block_length: int) -> list[Tensor]:
    """Tables for `prescribe`: a block hits `distinct` experts, on average over layers and blocks.

    `distinct` is at least K and at most E and L K. A block's experts are a random set, which its
    tokens take in turn.
    """
    generator = torch.Generator().manual_seed(0)
    num_layers = config.num_hidden_layers - config.first_k_dense_replace
    counts = counts_of_mean(distinct, num_layers * num_blocks)
    per_token = config.num_experts_per_tok
    turns = torch.arange(block_length * per_token).view(block_length, per_token)
    tables = []
    for layer in range(num_layers):
        blocks = []
        for count in counts[layer::num_layers]:
            experts = torch.randperm(config.num_experts, generator=generator)[:count]
            blocks.append(experts[turns % count])  # [L, K]
        tables.append(torch.cat(blocks))  # [num_blocks L, K]
    return tables


def counts_of_mean(mean: float, num: int) -> list[int]:
    """`num` whole numbers with this mean, as nearly as possible: 69.5 gives 70, 69, 69, 70, …."""
    return [round((index + 1) * mean) - round(index * mean) for index in range(num)]
