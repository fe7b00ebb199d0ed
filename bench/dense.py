"""A dense backbone of 135 million parameters: how far a forward is from its matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from open_block import open_block
from torch import Tensor, nn
from transformers import LlamaConfig

from dmax.benchmark.measure import Spread, in_turns, milliseconds, spread
from dmax.benchmark.report import Row, Table, figure
from dmax.benchmark.shapes import BLOCK_LENGTH
from dmax.checkpoint import Checkpoint, new_checkpoint
from dmax.environment import DTYPES

CONTEXT = 256  # tokens before the open block
NOTE = (
    f"One open block of 32 after {CONTEXT} cached tokens, head included, as the engine runs it. "
    "Products alone: the same linear layers on inputs of the same shape, and the head; attention's "
    "own two products are left out."
)


def dense_table(dtypes: Sequence[str], num_layers: int, repeats: int, compiles: bool) -> Table:
    """Forwards of the backbone in several dtypes, and compiled ones if they are wanted."""
    rows = []
    for dtype in dtypes:
        checkpoint = llama_135m(DTYPES[dtype], num_hidden_layers=num_layers)
        times = dense_times(checkpoint, repeats, compiles)
        floor = times["floor_ms"]["median"]
        row: Row = {"dtype": dtype, "parameters": checkpoint.model.num_parameters(), **times}
        row["ratio"] = times["ms_per_forward"]["median"] / floor
        if compiles:
            row["compiled_ratio"] = times["compiled_ms"]["median"] / floor
        rows.append(row)
    cells = [
        {
            "dtype": row["dtype"],
            "products alone, ms": figure(row["floor_ms"], ".1f"),
            "ms/forward": figure(row["ms_per_forward"], ".1f"),
            "ratio": figure(row["ratio"], ".2f"),
            "compiled": figure(row.get("compiled_ms"), ".1f"),
            "its ratio": figure(row.get("compiled_ratio"), ".2f"),
        }
        for row in rows
    ]
    return Table("dense", "135M dense backbone, random weights", rows, cells, NOTE)


def llama_135m(dtype: torch.dtype = torch.float32, **changes: Any) -> Checkpoint:
    """A Llama of SmolLM2-135M's shape, 134.5 million parameters; `changes` to its configuration."""
    shape: dict[str, Any] = {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
    } | changes
    config = LlamaConfig(
        **shape, eos_token_id=0, mask_token_id=shape["vocab_size"] - 1, block_length=BLOCK_LENGTH
    )
    torch.manual_seed(0)
    return new_checkpoint(config, dtype=dtype)


@torch.no_grad()
def dense_times(
    checkpoint: Checkpoint, repeats: int, compiles: bool, context: int = CONTEXT
) -> dict[str, Spread]:
    """Milliseconds of a denoising forward with its head, and of its products, in turns."""
    forward = open_block(checkpoint, context + checkpoint.special_ids.block_length)
    products = products_of(checkpoint, forward)

    def floor() -> None:
        for inputs, weight in products:
            F.linear(inputs, weight)

    runs: dict[str, Callable[[], object]] = {"ms_per_forward": forward, "floor_ms": floor}
    if compiles:
        length = context + checkpoint.special_ids.block_length
        runs["compiled_ms"] = open_block(checkpoint, length, compiled=True)
    cpu = torch.device("cpu")
    times = in_turns({name: partial(milliseconds, run, cpu) for name, run in runs.items()}, repeats)
    return {name: spread(each) for name, each in times.items()}


def products_of(
    checkpoint: Checkpoint, forward: Callable[[], object]
) -> list[tuple[Tensor, Tensor]]:
    """Inputs and weights of the products of a forward: its linear layers, and the head."""
    model: Any = checkpoint.model
    head = model.get_output_embeddings().weight
    inputs_of_head = torch.randn(checkpoint.special_ids.block_length, head.shape[1]).to(head.dtype)
    products = [(inputs_of_head, head)]

    def collect(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        products.append((inputs[0].clone(), layer.weight))

    layers = [layer for layer in model.base_model.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(collect) for layer in layers]
    forward()
    for hook in hooks:
        hook.remove()
    return products
