"""What the tile search times: kernels at the sizes of LLaDA-2.0-mini, and the tiles to try of each.

A case is a kernel at a number of rows or positions. Its tiles are the default and that tile with
one of its fields changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmax.benchmark.routing import list_pairs, replayed
from dmax.benchmark.shapes import BLOCK_LENGTH
from dmax.confidence import LARGEST
from dmax.kernels.moe import stored
from dmax.kernels.quant import quantize
from dmax.models import LLaDA2MoeConfig

Call = Callable[[], Tensor]
COLD = 2**28  # bytes of different keys and values, several times what a GPU's cache holds


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the model, and what is tried of each kernel.

    Attributes:
        config: of the model.
        distinct: experts that a block hits in a layer.
        formats: of the experts.
        rows: tokens of the experts.
        positions: of the head.
        contexts: of attention, each at all `batches`.
        batches: see `contexts`.
        calls: of a kernel in a graph.
    """

    config: LLaDA2MoeConfig
    distinct: float = 69.5
    formats: tuple[str, ...] = ("bf16", "int8", "fp8", "int4")
    rows: tuple[int, ...] = (32, 64, 128, 512, 1024)
    positions: tuple[int, ...] = (32, 64, 128, 512, 1024)
    contexts: tuple[int, ...] = (1024, 4096, 16_384)
    batches: tuple[int, ...] = (1, 16)
    calls: int = 8


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel at one size.

    Attributes:
        name: of its row in the record.
        default: its tile.
        tiles: others, by what is changed.
        calls: makes launches with a tile; all give the same result, up to rounding.
    """

    name: str
    default: Any
    tiles: Mapping[str, Any]
    calls: Callable[[Any], Sequence[Call]]


def changed(tile: Any, **changes: Sequence[int]) -> dict[str, Any]:
    """The tile with each of the values of one field, if they are others than its own."""
    return {
        f"{field} {value}": tile._replace(**{field: value})
        for field, values in changes.items()
        for value in values
        if value != getattr(tile, field)
    }


def cases(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, Callable[[], Iterator[Case]]]]:
    """Groups of cases by name; a group draws its weights when it is asked for."""
    for form in sizes.formats:
        yield f"experts, {form}", partial(expert_cases, sizes, form, device)
    yield "head", partial(head_cases, sizes, device)
    yield "attention", partial(attention_cases, sizes, device)


def drawn(*shape: int, device: torch.device) -> Tensor:
    """Normal numbers in bfloat16, as small as weights that are multiplied along the last axis."""
    numbers = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return numbers.normal_(std=shape[-1] ** -0.5)


def expert_cases(sizes: Sizes, form: str, device: torch.device) -> Iterator[Case]:
    """Both projections of the experts; a tile of one of them is tried beside the other's default.

    The experts of a block are prescribed, as in the other benchmarks, so that as many are read.
    """
    from dmax.kernels import moe_triton as kernels

    config = sizes.config
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    wide = [
        drawn(config.num_experts, *shape, device=device)
        for shape in ((2 * inner, hidden), (hidden, inner))
    ]
    gate_up, down = (stored(each if form == "bf16" else quantize(each, form)) for each in wide)  # type: ignore[arg-type]
    del wide  # makes room
    shared = (
        drawn(inner, hidden, device=device),
        drawn(inner, hidden, device=device),
        drawn(hidden, inner, device=device),
    )
    for rows in sizes.rows:
        tokens = drawn(rows, hidden, device=device) * hidden**0.5
        routing = routing_of(sizes, rows, device)

        def calls(tiles: Any, tokens: Tensor = tokens, routing: Any = routing) -> Sequence[Call]:
            call = partial(
                kernels.expert_terms, tokens, routing, gate_up, down, shared, True, tiles
            )
            return [call] * sizes.calls

        first, second = default = kernels.default_tiles(
            rows * config.num_experts_per_tok, config.num_experts, tokens.dtype, gate_up[0].dtype
        )
        tiles = {f"up: {label}": (tile, second) for label, tile in neighbours(first).items()}
        tiles |= {f"down: {label}": (first, tile) for label, tile in neighbours(second).items()}
        yield Case(f"experts, {form}, {rows} tokens", default, tiles, calls)


def neighbours(tile: Any) -> dict[str, Any]:
    """Tiles of experts with another width, warps or stages."""
    columns = (tile.columns // 2, 2 * tile.columns)
    warps = (2 if tile.warps == 4 else 4,)
    return changed(tile, columns=columns, warps=warps, stages=(tile.stages + 1,))


def routing_of(sizes: Sizes, rows: int, device: torch.device) -> Any:
    """Prescribed lists of every expert's tokens; the router's weights are alike."""
    from dmax.kernels.router_triton import Routing

    config = sizes.config
    blocks = -(-rows // BLOCK_LENGTH)
    table = replayed(config, sizes.distinct, blocks, BLOCK_LENGTH)[0][:rows].to(device)
    num_terms = config.num_experts_per_tok + 1
    lists = list_pairs(table, config.num_experts, num_terms)
    weights = torch.full(table.shape, 1 / table.shape[1], dtype=torch.bfloat16, device=device)
    return Routing(weights=weights, num_terms=num_terms, **lists)


def head_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """The best token of each position, merged over the tiles of the vocabulary."""
    from dmax.kernels import lm_head_triton as kernels

    config = sizes.config
    weight = drawn(config.vocab_size, config.hidden_size, device=device)
    for positions in sizes.positions:
        hidden = drawn(positions, config.hidden_size, device=device) * config.hidden_size**0.5

        def calls(tile: Any, hidden: Tensor = hidden) -> Sequence[Call]:
            def call() -> Tensor:
                tiles = kernels.top_k_of_tiles(hidden, weight, 1, MASK, LARGEST, tile=tile)
                probabilities: Tensor = kernels.merge(tiles)[1]
                return probabilities

            return [call] * sizes.calls

        default = kernels.default_tile(kernels.positions_of_tile(positions), weight.dtype)
        tiles = changed(
            default, vocabulary=(64, 256), size=(2 * default.size,), warps=(4, 8), stages=(3, 5)
        )
        yield Case(f"head, {positions} positions", default, tiles, calls)


MASK = 0  # the token that is never chosen; which one makes no difference


def attention_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Blocks at the end of contexts, each launch with keys and values of its own."""
    from dmax.kernels import block_attention_triton as kernels

    config = sizes.config
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    norm = torch.ones(size, dtype=torch.bfloat16, device=device)
    for batch in sizes.batches:
        projected = drawn(batch, BLOCK_LENGTH, heads + 2 * groups, size, device=device)
        slots = torch.arange(batch, device=device)
        for context in sizes.contexts:
            shape = (batch, context, groups, size)
            bytes_of_store = 2 * 2 * batch * context * groups * size
            stores = [
                (drawn(*shape, device=device), drawn(*shape, device=device))
                for _ in range(min(max(COLD // bytes_of_store, 1), 20))
            ]
            turn = torch.ones(1, context, 1, size // 2, dtype=torch.bfloat16, device=device)
            starts = torch.full_like(slots, context - BLOCK_LENGTH)

            def calls(
                tile: Any, stores: Any = stores, turn: Tensor = turn, starts: Tensor = starts,
                projected: Tensor = projected, slots: Tensor = slots,
            ) -> Sequence[Call]:  # fmt: skip
                return [
                    partial(
                        kernels.block_attention, projected, (norm, norm), 1e-6, (turn, turn),
                        keys, values, slots, starts, starts, size**-0.5, tile,
                    )
                    for keys, values in stores
                ]  # fmt: skip

            default = kernels.default_tile(projected.dtype)
            tiles = changed(default, queries=(32,), keys=(32, 128), warps=(8,), stages=(2, 4))
            tiles["queries 128, warps 8"] = default._replace(
                queries=128, warps=8, stages=2, at_once=1
            )
            yield Case(f"attention, {context} positions, batch {batch}", default, tiles, calls)
