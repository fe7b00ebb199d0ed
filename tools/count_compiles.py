"""Counts how often Triton compiles each kernel while one request grows, with no GPU there.

    python tools/count_compiles.py

A request of LLaDA-2.0-mini's sizes (two layers of it) goes from 32 to 16,384 positions, as steps in
CUDA graphs and as eager ones, on a device without numbers. A driver that names an H100 stands in
for the real one, and a compiled kernel does nothing. A kernel is compiled anew for other constants
and for arguments that are 1, divisible by 16 or neither, so what changes with the context must be
none of these: compiling takes seconds in the middle of a request.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from compile_kernels import AbsentGPU
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from dmax.benchmark.shapes import BLOCK_LENGTH, llada2_mini
from dmax.decoding import get_strategy
from dmax.engine.batch import Batch, Row
from dmax.engine.blocks import OpenBlocks
from dmax.engine.graphs import GraphedSteps, Replay
from dmax.engine.runner import ModelRunner
from dmax.engine.step import step
from dmax.kernels import using
from dmax.params import DecodingParams

DEVICE = torch.device("meta")
POSITIONS = 16_384
EVERY = 15  # blocks between two that are looked at, from the 64th on: no power of two divides it
H100 = 90


class Compiled:
    """A kernel that does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None:
        """What a profiler would be told."""

    def run(self, *_: Any) -> None:
        """Its launch."""


class Compiler:
    """In place of Triton's: counts what it is given.

    Attributes:
        counts: kernels compiled, by name.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, kernel: JITFunction[Any], key: Any, *_: Any, **__: Any) -> Compiled:
        """In place of `JITFunction._do_compile`."""
        self.counts[kernel.fn.__name__] += 1
        kernel_cache = kernel.device_caches[0][0]
        kernel_cache[key] = compiled = Compiled()
        return compiled


def positions_of_request() -> list[int]:
    """Starts of the blocks that are looked at: the first ones, some of the others, the last one."""
    starts = list(range(0, POSITIONS, BLOCK_LENGTH))
    return [*starts[:64], *starts[64::EVERY], starts[-1]]


@torch.inference_mode()
def compiles_of_a_request() -> Counter[str]:
    """How often each kernel is compiled in a request, eager or captured, greedy or sampled."""
    compiler = Compiler()
    driver.set_active(AbsentGPU(H100))
    checkpoint = llada2_mini(torch.bfloat16, DEVICE, num_hidden_layers=2)
    checkpoint.model.set_experts_implementation("fused_moe")
    special_ids = checkpoint.special_ids
    runner = ModelRunner(checkpoint.model, special_ids, 2, POSITIONS)
    params = DecodingParams("spd")
    strategy = get_strategy(params)
    blocks = OpenBlocks(strategy, 2, special_ids, runner.embed, DEVICE)
    blocks.admit(0, strategy, params)
    with (
        patch.object(JITFunction, "_do_compile", lambda *args, **more: compiler(*args, **more)),
        patch("dmax.engine.graphs.CudaCapture", lambda: run_again),
        using("triton"),
    ):
        steps = GraphedSteps(runner)
        for start in positions_of_request():
            blocks.open(0)
            opened: Row = (0, start, start, 0, -1)
            before: Row = (0, start - BLOCK_LENGTH, start - BLOCK_LENGTH, -1, -1)
            first = [before, opened] if start else [opened]
            tokens = [(0,) * BLOCK_LENGTH for _ in first[1:]]
            for batch in (
                Batch.of(first, tokens, BLOCK_LENGTH),
                Batch.of([opened], [], BLOCK_LENGTH),
            ):
                step(runner, blocks, batch.to(DEVICE))
                steps(blocks, batch)
    return compiler.counts


def run_again(run: Replay) -> Replay:
    """In place of a capture: every replay launches its kernels."""
    return run


def main() -> None:
    """Print a line for each kernel."""
    for name, number in sorted(compiles_of_a_request().items()):
        print(f"{name} {number}")


if __name__ == "__main__":
    main()
