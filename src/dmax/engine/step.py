"""One step of open blocks: read, forward, decide, apply, store.

This is the function that everything else in the engine prepares. A CUDA graph captures it whole,
so nothing in it waits for the device or depends on values. Another engine, which runs the forward
itself, calls the two halves: `OpenBlocks.inputs` before its forward and `decide` after it, under
`torch.inference_mode()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmax.decoding.block import Output, apply
from dmax.kernels.decide import decide_in_place, fits_kernel

if TYPE_CHECKING:
    from dmax.engine.batch import Batch
    from dmax.engine.blocks import OpenBlocks
    from dmax.engine.runner import ModelRunner


def step(runner: ModelRunner, blocks: OpenBlocks, batch: Batch) -> None:
    """One forward over a batch, which updates its open blocks and their flags in place.

    Args:
        runner: the model and its cache.
        blocks: the open blocks.
        batch: which of them, and where; on the device.
    """
    embeds = blocks.inputs(batch.rows, batch.num_branches)  # [R, L, D]
    output = runner.forward(batch, embeds, blocks.strategy.needs_hidden_states)
    decide(blocks, batch.rows, output, batch.before, batch.starts)


def decide(
    blocks: OpenBlocks,
    rows: Tensor,
    output: Output,
    before: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """What becomes of the blocks in `rows` after a forward over them.

    Args:
        blocks: the open blocks.
        rows: [B] int64, rows of `blocks`.
        output: what the model says of them; with branches of all B * num_branches.
        before: [B] int64, rows of the open blocks before them, -1 where there is none.
        starts: [B] int64, where the blocks begin in their sequences; None: nothing is drawn, all
            rows are greedy.

    Returns:
        [6, B] bool: the block is done, it was forced, it was capped, it is invalid (all as in
        `Advance`), its logits held a NaN, the next block may open.
    """
    noise = None if starts is None else blocks.noise(rows, starts)
    fused = blocks.strategy.fused()
    if fused is not None:
        top_k, switches = fused
        predicted = output.top(top_k, noise)
        is_first = switches["soft_inputs"] and not blocks.feedback  # which `store` makes then
        if fits_kernel(predicted) and not is_first:
            return decide_in_place(blocks, rows, predicted, **switches)

    view = blocks.view(rows, before, noise)
    strategy = blocks.strategy_of(rows)
    decision, state = strategy.step(view, output, blocks.state_of(rows))
    advance = apply(view, decision)
    blocks.store(rows, advance, decision, state)

    broken = output.broken.view(len(rows), -1).any(dim=1)
    may_open_next = blocks.may_open_next(rows)
    flags = torch.stack(
        (advance.done, advance.forced, advance.capped, advance.invalid, broken, may_open_next)
    )
    blocks.flags[rows] = flags.T
    return flags
