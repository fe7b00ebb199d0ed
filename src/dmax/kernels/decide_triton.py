"""The Triton path of `decide.py`, with one warp for each block."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmax.kernels.pdl_triton import begin, launch_options


@triton.jit(do_not_specialize=("rows", "num_blocks"))
def _decide_kernel(  # type: ignore[no-untyped-def]
    tokens, masked, active, written, confidence, step, max_steps, threshold, stop_confidence,
    kept_flags, fed_ids, fed_probs, rows, ids, probs, broken, flags, num_blocks, mask_token_id,
    long_stride, float_stride, byte_stride,
    L: tl.constexpr, K: tl.constexpr, PREFIX_ONLY: tl.constexpr,
    STOP_ON_CONFIDENCE: tl.constexpr, STOP_ON_CONSISTENCY: tl.constexpr, BLOCK_L: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One block: its row of `tokens` and of what goes with them is read and written in place.

    These lie side by side in the bytes of a row, so they share strides as far as their types do.
    """
    begin(PDL)
    block = tl.program_id(0)
    row = tl.load(rows + block)

    flag = flags + block
    if _stands_before(rows, block, row):  # and is left to that program: two would race for it
        for index in tl.static_range(6):
            tl.store(flag + index * num_blocks, False)
        return

    position = tl.arange(0, BLOCK_L)
    inside = position < L  # the rest is read as zeros, neither masked nor active
    token_at = row * long_stride + position
    byte_at = row * byte_stride + position
    fed_at = (row * L + position) * K
    predicted_at = (block.to(tl.int64) * L + position) * K

    old_tokens = tl.load(tokens + token_at, mask=inside, other=0)
    is_masked = tl.load(masked + byte_at, mask=inside, other=0)
    is_active = tl.load(active + byte_at, mask=inside, other=0)
    is_decoded = is_active & ~is_masked
    new_tokens = tl.load(ids + predicted_at, mask=inside, other=0)
    sureness = tl.load(probs + predicted_at, mask=inside, other=0.0)
    num_steps = tl.load(step + row * long_stride)
    is_last = num_steps >= tl.load(max_steps + row) - 1

    # Promote masked positions and revise those decoded earlier. At the cap no mask is left.
    is_promoted = _promoted(is_masked, sureness, tl.load(threshold + row), position, PREFIX_ONLY)
    is_undecided = is_masked & ~is_promoted
    stays_masked = is_undecided
    if is_last:
        stays_masked = tl.zeros_like(is_undecided)
    is_written = (is_masked | is_decoded) & ~stays_masked
    tl.store(tokens + token_at, tl.where(is_written, new_tokens, old_tokens), mask=inside)
    tl.store(masked + byte_at, stays_masked, mask=inside)
    tl.store(written + byte_at, is_written, mask=inside)
    tl.store(confidence + row * float_stride + position, sureness, mask=inside)
    tl.store(step + row * long_stride, num_steps + 1)

    # Feed back what was decoded as blends; the masks say which positions these are.
    if fed_ids is not None:
        for rank in tl.static_range(K):
            _copy(ids + predicted_at + rank, fed_ids + fed_at + rank, inside)
            _copy(probs + predicted_at + rank, fed_probs + fed_at + rank, inside)

    # Converged? A promotion counts as a change, so no mask may have been left before.
    has_changed = is_masked | (is_decoded & (new_tokens != old_tokens))
    is_unsure = is_undecided | ~(sureness >= tl.load(stop_confidence + row))
    is_done = (_count(has_changed) == 0) & STOP_ON_CONSISTENCY
    is_done = is_done | ((_count(is_active & is_unsure) == 0) & STOP_ON_CONFIDENCE)
    converged = ((_count(is_undecided) == 0) & is_done) | (_count(is_active) == 0)
    is_mask_token = is_written & (new_tokens == mask_token_id)
    is_broken = tl.load(broken + block * L + position, mask=inside, other=0)
    kept = kept_flags + row * byte_stride
    _tell(flag, kept, converged | is_last)
    _tell(flag + num_blocks, kept + 1, False)  # forced: where a mask was, one has been promoted
    _tell(flag + 2 * num_blocks, kept + 2, is_last & ~converged)
    _tell(flag + 3 * num_blocks, kept + 3, _count(is_mask_token) > 0)
    _tell(flag + 4 * num_blocks, kept + 4, _count(is_broken) > 0)
    _tell(flag + 5 * num_blocks, kept + 5, False)  # one block is open: no next one may open early


@triton.jit
def _tell(flag, kept, value):  # type: ignore[no-untyped-def]
    """A flag of a block, for who called and for who reads the row later."""
    tl.store(flag, value)
    tl.store(kept, value)


@triton.jit
def _stands_before(rows, block, row):  # type: ignore[no-untyped-def]
    """Whether a row has a place before this block's."""
    found = tl.zeros((), tl.int32)
    for start in range(0, block, 32):
        place = start + tl.arange(0, 32)
        found += _count(tl.load(rows + place, mask=place < block, other=-1) == row)
    return found > 0


@triton.jit
def _promoted(  # type: ignore[no-untyped-def]
    is_masked, sureness, threshold, position, PREFIX_ONLY: tl.constexpr
):
    """`dmax.decoding.spd.prefix`, or `dmax.decoding.selection.above`."""
    is_sure = sureness >= threshold  # a NaN is not
    if PREFIX_ONLY:
        first_unsure = _first(is_masked & ~is_sure, position)
        leftmost = _first(is_masked, position)
        return is_masked & ((position < first_unsure) | (position == leftmost))
    order = tl.where(sureness != sureness, 2.0, sureness)  # `torch.argmax` takes a NaN
    highest = tl.max(tl.where(is_masked, order, -1.0), axis=0)
    surest = _first(is_masked & (order == highest), position)
    return is_masked & (is_sure | (position == surest))


@triton.jit
def _copy(source, target, inside):  # type: ignore[no-untyped-def]
    """Copy one number of each position."""
    tl.store(target, tl.load(source, mask=inside, other=0), mask=inside)


@triton.jit
def _first(where, position):  # type: ignore[no-untyped-def]
    """The first position that is True, or one after all."""
    return tl.min(tl.where(where, position, position.shape[0]), axis=0)


@triton.jit
def _count(where):  # type: ignore[no-untyped-def]
    """How many positions of a block are True."""
    return tl.sum(where.to(tl.int32), axis=0)


def decide(
    blocks: Any,
    rows: Tensor,
    predicted: Any,
    *,
    prefix_only: bool,
    soft_inputs: bool,
    stop_on_confidence: bool,
    stop_on_consistency: bool,
) -> Tensor:
    """`dmax.kernels.decide.decide_in_place`, with its `Blocks` and `Candidates`."""
    num_blocks = len(rows)
    flags = torch.empty(6, num_blocks, dtype=torch.bool, device=rows.device)
    ids = predicted.ids.contiguous()
    length, k = ids.shape[1:]
    fed_back = (blocks.feedback["ids"], blocks.feedback["probs"]) if soft_inputs else (None, None)
    kernel: Any = _decide_kernel
    kernel[(num_blocks,)](
        blocks.tokens, blocks.masked, blocks.active, blocks.written, blocks.confidence,
        blocks.step, blocks.max_steps, blocks.numbers["threshold"],
        blocks.numbers["stop_confidence"], blocks.flags, *fed_back, rows, ids,
        predicted.probs.contiguous(), predicted.broken.contiguous(), flags, num_blocks,
        blocks.mask_token_id, blocks.tokens.stride(0), blocks.confidence.stride(0),
        blocks.masked.stride(0),
        L=length, K=k, PREFIX_ONLY=prefix_only, STOP_ON_CONFIDENCE=stop_on_confidence,
        STOP_ON_CONSISTENCY=stop_on_consistency, BLOCK_L=triton.next_power_of_2(length),
        num_warps=1, **launch_options(rows.device),
    )  # fmt: skip
    return flags
