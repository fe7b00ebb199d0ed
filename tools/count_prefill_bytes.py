"""Counts the memory that a long prompt of LLaDA-2.0-mini takes on a GPU, with none there.

    python tools/count_prefill_bytes.py

The last chunk of a prompt runs through one layer, on a device without numbers. What counts are the
tensors that are there at the same time, beside weights, keys and values: for attention with the
mask spelt out, for PyTorch's attention block by block, and for our kernels. Those of PyTorch count
as one operation, as they are on a GPU.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from triton.runtime.jit import JITFunction

from dmax.benchmark.shapes import llada2_mini
from dmax.engine.runner import ModelRunner
from dmax.kernels import using
from dmax.models.llada2_moe.modeling import LLaDA2MoeModel

DEVICE = torch.device("meta")
CHUNK = 512
WAYS = ("mask", "blocks", "kernels")


def attended(query: Tensor, *_: Any, **__: Any) -> Tensor:
    """In place of PyTorch's attention: its result, and nothing in between."""
    return torch.empty_like(query)


def peak_bytes(way: str, num_positions: int) -> int:
    """At the end of a prompt of so many positions; `way` is one of `WAYS`."""
    is_fused = way == "kernels"
    checkpoint = llada2_mini(torch.bfloat16, DEVICE, num_hidden_layers=1)
    checkpoint.model.set_experts_implementation("fused_moe" if is_fused else "batched_mm")
    runner = ModelRunner(checkpoint.model, checkpoint.special_ids, 1, num_positions)
    tokens = torch.zeros(1, CHUNK, dtype=torch.long, device=DEVICE)
    tracker = MemTracker()
    with ExitStack() as stack:
        stack.enter_context(using("triton" if is_fused else "torch"))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attended))
        stack.enter_context(patch.object(JITFunction, "run", lambda *_, **__: None))
        stack.enter_context(patch.object(LLaDA2MoeModel, "takes_staircase", way == "blocks"))
        runner.prefill([0], tokens)  # makes what later chunks find in its place
        runner.cache.commit([0], num_positions - 2 * CHUNK)
        tracker.track_external(checkpoint.model, *runner.cache.keys, *runner.cache.values)
        stack.enter_context(tracker)
        before = tracker.get_tracker_snapshot("current")[DEVICE]["Total"]
        runner.prefill([0], tokens)
    return tracker.get_tracker_snapshot("peak")[DEVICE]["Total"] - before


def main() -> None:
    """A row for each length of the prompt."""
    print(f"peak MiB of a chunk of {CHUNK} positions")
    print("| positions |", " | ".join(WAYS), "|")
    for num_positions in (1024, 4096, 16_384):
        found = [peak_bytes(way, num_positions) / 2**20 for way in WAYS]
        print(f"| {num_positions} |", " | ".join(f"{each:.0f}" for each in found), "|")


if __name__ == "__main__":
    main()
