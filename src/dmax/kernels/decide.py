"""SPD's decision in place: open blocks after a forward, in one kernel on a GPU.

The algorithm reads best where it stands: `SoftParallelDecoding.step` decides,
`dmax.decoding.block.apply` enforces the rules, `OpenBlocks.store` keeps the outcome, and
`dmax.engine.step.decide` collects the flags. These four are the twin of the Triton path
(`decide_triton.py`): some eighty small operations of PyTorch, each of which takes a GPU longer to
start than to do.

Shapes: S rows of open blocks, B of them in a step, L block length, k candidates.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dmax.confidence import Candidates
from dmax.kernels import implementation

MAX_BLOCK_LENGTH = 128  # one warp has a whole block in its registers


class Blocks(Protocol):
    """What `dmax.engine.blocks.OpenBlocks` knows of S rows; read and written where it is.

    All but the settings and the feedback are views of one tensor of bytes.

    Attributes:
        tokens: [S, L] int64.
        masked: [S, L] bool.
        active: [S, L] bool, only read.
        written: [S, L] bool.
        confidence: [S, L] float32.
        step: [S] int64.
        flags: [S, 6] bool, those of the last step; only written.
        max_steps: [S] int64, only read.
        numbers: [S, 1] float32 each, only read: `threshold` and `stop_confidence`.
        feedback: `ids` [S, L, k] int64 and `probs` [S, L, k] float32, if there are soft inputs.
        mask_token_id: MASK.
    """

    tokens: Tensor
    masked: Tensor
    active: Tensor
    written: Tensor
    confidence: Tensor
    step: Tensor
    flags: Tensor
    max_steps: Tensor
    numbers: dict[str, Tensor]
    feedback: dict[str, Tensor]
    mask_token_id: int


def fits_kernel(predicted: Candidates) -> bool:
    """Whether the kernel takes these candidates [B, L, k]; device, dtype and length decide."""
    return (
        implementation(predicted.ids.device) == "triton"
        and predicted.probs.dtype == torch.float32
        and predicted.ids.shape[1] <= MAX_BLOCK_LENGTH
    )


def decide_in_place(
    blocks: Blocks, rows: Tensor, predicted: Candidates, **switches: bool
) -> Tensor:
    """One step of SPD for the blocks in `rows`, with candidates that `fits_kernel` accepts.

    What is stored is what the twin stores, bit for bit. A row may be named more than once, as the
    spare row of idle places in a batch is. Then its first place decides, and the others write
    nothing and have no flags.

    Args:
        blocks: all open blocks.
        rows: [B] int64.
        predicted: [B, L, k].
        switches: `prefix_only`, `soft_inputs`, `stop_on_confidence` and `stop_on_consistency` of
            the strategy.

    Returns:
        [6, B] bool, as `dmax.engine.step.decide`.
    """
    from dmax.kernels import decide_triton

    return decide_triton.decide(blocks, rows, predicted, **switches)
