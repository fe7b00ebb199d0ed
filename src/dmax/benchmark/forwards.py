"""A forward over one open block, head included: our kernels, and transformers' experts, on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dmax.benchmark.measure import in_turns, milliseconds, open_block, spread
from dmax.benchmark.report import Row, Section
from dmax.benchmark.rig import Rig, failure
from dmax.benchmark.routing import counted, prescribe
from dmax.engine.graphs import CudaCapture
from dmax.kernels import using

IMPLEMENTATIONS = ("fused_moe", "grouped_mm", "batched_mm", "eager")


@torch.no_grad()
def forwards(rig: Rig) -> Section:
    """One open block behind a prefix, head included, with every experts implementation."""
    rows = []
    for routing, distinct in (("replayed", rig.options.distinct), ("uniform", None)):
        prescribe(rig.checkpoint.model, distinct, 1, rig.checkpoint.special_ids.block_length)
        rows += [{"routing": routing, **row} for row in forward_rows(rig)]
    columns = {
        "routing": "routing",
        "experts": "experts",
        "graph": "graph",
        "distinct": "distinct:.1f",
        "GB": "gb:.2f",
        "floor ms": "floor_ms:.2f",
        "ms": "ms:.2f",
        "of floor": "of_floor:.0%",
        "problem": "error",
    }
    note = (
        f"Batch 1, {rig.options.context} positions. Replayed: {rig.options.distinct:g} distinct experts in a layer, on "
        "average. Other experts than fused_moe run without any kernel of ours. Of floor: the time of reading the bytes "
        "at the bandwidth of a copy, over the time measured."
    )
    return Section("forwards", "one forward of a block, bfloat16", columns, rows, note)


def forward_rows(rig: Rig) -> list[Row]:
    """A row for each implementation, launched kernel by kernel and, where that is possible, as a CUDA graph."""
    model: Any = rig.checkpoint.model
    forward = open_block(rig.checkpoint, rig.options.context)
    with counted(model) as found:
        forward()
    distinct = sum(found) / len(found)
    cases = [(name, False) for name in IMPLEMENTATIONS]
    if rig.on_gpu:
        cases += [
            (name, True) for name in IMPLEMENTATIONS if name != "eager"
        ]  # it waits for the device
    runs: dict[str, Callable[[], float]] = {}
    failed: dict[str, Row] = {}
    for name, graph in cases:
        try:
            runs[f"{name} {graph}"] = timed_forward(rig, forward, name, graph)
        except RuntimeError as error:  # out of memory, or an implementation that no graph can hold
            failed[f"{name} {graph}"] = failure(error)
    times = in_turns(runs, rig.options.forwards, warm_up=2)
    model.set_experts_implementation("fused_moe")
    context = rig.options.context
    rows = []
    for name, graph in cases:
        row: Row = {"experts": name, "graph": graph, "distinct": distinct}
        if (key := f"{name} {graph}") in failed:
            rows.append(row | failed[key])
            continue
        rows.append(rig.against_floor(row | {"ms": spread(times[key])}, "ms", context=context))
    return rows


def timed_forward(
    rig: Rig, forward: Callable[[], Tensor], name: str, graph: bool
) -> Callable[[], float]:
    """What runs the forward once with an experts implementation and gives its milliseconds; tried once here."""
    model: Any = rig.checkpoint.model
    ours = name == "fused_moe"
    model.set_experts_implementation(name)
    with nullcontext() if ours else using("torch"):
        run = CudaCapture()(forward) if graph else forward
        run()

    def timed() -> float:
        model.set_experts_implementation(name)
        with nullcontext() if ours else using("torch"):
            return milliseconds(run, rig.device)

    return timed
