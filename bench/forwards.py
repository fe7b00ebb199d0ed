"""A forward over one open block, head included: our kernels, and transformers' experts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from open_block import captured, open_block
from torch import Tensor

from dmax.benchmark.gpu import failure
from dmax.benchmark.measure import Spread, in_turns, milliseconds, spread
from dmax.benchmark.report import MISSING, Row, Table, figure
from dmax.benchmark.roofline import against_floor, forward_bytes
from dmax.benchmark.routing import distinct_experts, prescribe, replayed
from dmax.checkpoint import Checkpoint
from dmax.kernels import using

IMPLEMENTATIONS = ("fused_moe", "grouped_mm", "batched_mm", "eager")


@torch.no_grad()
def forward_table(
    checkpoint: Checkpoint, distinct: float, context: int, repeats: int, bandwidth: Spread
) -> Table:
    """One open block after a prefix, with every experts implementation.

    Args:
        checkpoint: the model.
        distinct: experts that a block hits in a layer, on average, with replayed routing.
        context: positions, the block's own among them.
        repeats: forwards timed for each row.
        bandwidth: of a copy, bytes per second.
    """
    config = checkpoint.model.config
    length = checkpoint.special_ids.block_length
    routings = {
        "replayed": replayed(config, distinct, 1, length),
        "uniform": uniform(config, length),
    }
    rows: list[Row] = []
    for routing, tables in routings.items():
        prescribe(checkpoint.model, tables)
        measured = forward_rows(checkpoint, context, repeats, bandwidth)
        rows += [{"routing": routing, **row} for row in measured]
    cells = [
        {
            "routing": row["routing"],
            "experts": row["experts"],
            "graph": "yes" if row["graph"] else "no",
            "distinct": figure(row["distinct"], ".1f"),
            "GB": figure(row.get("gb"), ".2f"),
            "floor ms": figure(row.get("floor_ms"), ".2f"),
            "ms": figure(row.get("ms"), ".2f"),
            "of floor": figure(row.get("of_floor"), ".0%"),
            "problem": row.get("error", MISSING),
        }
        for row in rows
    ]
    note = (
        f"Batch 1, {context} positions. Replayed: {distinct:g} distinct experts in a layer, on "
        "average. Other experts than fused_moe run without any kernel of ours. Of floor: the time "
        "of reading the bytes at the bandwidth of a copy, over the time measured."
    )
    return Table("forwards", "one forward of a block, bfloat16", rows, cells, note)


def uniform(config: Any, num_tokens: int) -> list[Tensor]:
    """Tables for `prescribe`: each token's experts drawn at random, without repetition."""
    generator = torch.Generator().manual_seed(0)
    num_layers = config.num_hidden_layers - config.first_k_dense_replace
    tables = []
    for _ in range(num_layers):
        scores = torch.rand((num_tokens, config.num_experts), generator=generator)
        tables.append(scores.topk(config.num_experts_per_tok, dim=-1).indices)
    return tables


def forward_rows(
    checkpoint: Checkpoint, context: int, repeats: int, bandwidth: Spread
) -> list[Row]:
    """A row for each implementation, kernel by kernel and, where it can be, as a CUDA graph."""
    model: Any = checkpoint.model
    forward = open_block(checkpoint, context)
    cases = [(name, False) for name in IMPLEMENTATIONS]
    if model.device.type == "cuda":  # `eager` waits for the device, which no graph can hold
        cases += [(name, True) for name in IMPLEMENTATIONS if name != "eager"]
    runs: dict[tuple[str, bool], Callable[[], float]] = {}
    failed: dict[tuple[str, bool], Row] = {}
    for name, graph in cases:
        try:
            runs[name, graph] = timed_forward(model, forward, name, graph)
        except RuntimeError as error:  # out of memory, or an implementation that no graph can hold
            failed[name, graph] = failure(error)
    times = in_turns(runs, repeats, warm_up=2)
    model.set_experts_implementation("fused_moe")

    distinct = distinct_experts(model, checkpoint.special_ids.block_length)
    parts = forward_bytes(model, distinct, context)
    rows = []
    for case in cases:
        row: Row = {"experts": case[0], "graph": case[1], "distinct": distinct}
        if case in failed:
            row |= failed[case]
        else:
            row["ms"] = spread(times[case])
            row |= against_floor(row["ms"], parts, bandwidth)
        rows.append(row)
    return rows


def timed_forward(
    model: Any, forward: Callable[[], Tensor], name: str, graph: bool
) -> Callable[[], float]:
    """Runs the forward with an experts implementation and gives milliseconds; tried once here."""
    kernels = nullcontext if name == "fused_moe" else without_kernels
    model.set_experts_implementation(name)
    with kernels():
        run = captured(forward) if graph else forward
        run()

    def timed() -> float:
        model.set_experts_implementation(name)
        with kernels():
            return milliseconds(run, model.device)

    return timed


def without_kernels() -> Any:
    """Within it no Triton kernel runs, of any kind."""
    return using("torch")
