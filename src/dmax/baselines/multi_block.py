"""Training on the states that decoding of several open blocks meets (MBD-LMs, arXiv 2606.29215).

The blocks of a response are grouped into buffers of two, as `mbd` has at most two open. A noisy
block sees the noisy blocks of its buffer up to itself, and clean blocks before the buffer only. The
first block of a buffer is nearly done, the second has hardly begun.

Shapes: B sequences, L' noisy positions in K blocks of W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmax.errors import InputError
from dmax.training.clean_stream import CleanBatch, NoisyBatch, noisy_positions, take
from dmax.training.noise import mask_ratios
from dmax.training.objectives import OPUT
from dmax.training.rollout import draw
from dmax.training.vocabulary import IGNORE

BUFFER = 2


@dataclass(frozen=True, slots=True)
class MultiBlockOPUT(OPUT):
    """`oput_loss` on multi-block states, for decoding by `mbd`: MBD-DMax.

    The source masks U(0.001, 0.2) of a buffer's first block and U(0.8, 1) of its second. It has
    each sequence twice, with its blocks paired from the first or from the second on; here every
    sequence draws one of the two. It replaces masks by the model's predictions. That these are the
    likeliest tokens (`rollout: argmax`) is a guess, and so is what becomes of a response's first
    block where the pairs begin behind it: it has as many masks as a second one, since decoding
    begins so. A last block without a partner is a first one.

    Attributes:
        mask_ratio_low: of the first block of a buffer, the largest ratio.
        mask_ratio_high: of the second block, the smallest one.
    """

    decoding = "mbd"

    def __post_init__(self) -> None:
        """Raises `InputError` for a rollout of blends, and for ratios that part no blocks."""
        if self.rollout not in ("argmax", "sample"):
            raise InputError(
                f"`rollout` of mbd_oput must be argmax or sample, got {self.rollout!r}",
                hint="set `rollout: argmax`",
            )
        if self.mask_ratio_low >= self.mask_ratio_high:
            raise InputError(
                "mbd_oput masks at most `mask_ratio_low` of a first block and at least "
                "`mask_ratio_high` of a second one, which must be more, got "
                f"{self.mask_ratio_low} and {self.mask_ratio_high}",
                hint="the source has `mask_ratio_low: 0.2` and `mask_ratio_high: 0.8`",
            )

    def masked(self, clean: CleanBatch, generator: torch.Generator) -> tuple[NoisyBatch, Tensor]:
        """The batch with its buffers and masks, and the share of masks in every noisy copy, [B]."""
        positions = noisy_positions(clean, self.block_length)  # [B, L']
        ids = take(clean.clean_ids, positions)
        labels = take(clean.labels, positions, beyond=IGNORE)
        corruptible = take(clean.corruptible, positions)
        num_blocks = positions.shape[1] // self.block_length

        shifts = draw_shifts(len(ids), generator)  # [B]
        is_second = second_blocks(shifts, num_blocks)  # [B, K]
        ratios = buffer_ratios(is_second, self.mask_ratio_low, self.mask_ratio_high, generator)
        noisy = mask_blocks(ids, corruptible, ratios, self.mask_token_id, generator)

        places = seen_before(is_second).repeat_interleave(self.block_length, dim=1)  # [B, L']
        share = (noisy != ids).sum(dim=1) / corruptible.sum(dim=1).clamp(min=1)
        return NoisyBatch(clean.clean_ids, noisy, labels, positions, places.to(ids.device)), share


def draw_shifts(num: int, generator: torch.Generator) -> Tensor:
    """0 or 1 for each of `num` sequences, [num] int64: how many blocks stand before the buffers."""
    return torch.randint(BUFFER, (num,), generator=generator, device=generator.device)


def second_blocks(shifts: Tensor, num_blocks: int) -> Tensor:
    """Which blocks are the second of their buffer.

    A buffer that would begin one block before the response has its second block only.

    Args:
        shifts: [B] int64, 0 or 1.
        num_blocks: K.

    Returns:
        [B, K] bool.
    """
    block = torch.arange(num_blocks, device=shifts.device)
    return (block + shifts[:, None]) % BUFFER == 1


def seen_before(is_second: Tensor) -> Tensor:
    """How many noisy blocks before it each block sees, [B, K] int64, of `second_blocks`."""
    places = is_second.long()
    places[:, 0] = 0  # before it is the prompt
    return places


def buffer_ratios(is_second: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Mask ratios of blocks: U(0, low), or U(high, 1) in the second of a buffer.

    Args:
        is_second: [B, K] bool.
        low: largest ratio of a first block.
        high: smallest ratio of a second block.
        generator: random source.

    Returns:
        [B, K] float32.
    """
    share = mask_ratios(is_second.numel(), 0.0, 1.0, generator).view(is_second.shape)
    return torch.where(is_second, high + (1 - high) * share, low * share)


def mask_blocks(
    ids: Tensor,
    corruptible: Tensor,
    ratios: Tensor,
    mask_token_id: int,
    generator: torch.Generator,
) -> Tensor:
    """Mask an exact share of each block's corruptible tokens, ⌊ratio · number⌋, drawn at random.

    Args:
        ids: [B, L'] int64, clean tokens.
        corruptible: [B, L'] bool, the positions that may change.
        ratios: [B, K] float32.
        mask_token_id: MASK.
        generator: of any device.

    Returns:
        [B, L'] int64, noisy tokens.
    """
    by_block = (*ratios.shape, -1)  # [B, K, W]
    order = draw(ids.shape, generator, ids.device).masked_fill(~corruptible, 2.0)  # these come last
    rank = order.view(by_block).argsort(dim=-1).argsort(dim=-1)
    allowed = corruptible.view(by_block).sum(dim=-1)  # [B, K]
    count = (ratios.to(ids.device) * allowed).floor()
    return ids.masked_fill((rank < count[..., None]).view(ids.shape), mask_token_id)
