"""Blocks that grow while a model learns to decode them, as LLaDA-2.0 does (arXiv 2512.15745).

A block of one position sees what an autoregressive model sees. So training begins close to what
such a model can do, and leads from there to blocks of the length that it shall decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dmax.errors import InputError, show

Stages = Sequence[Sequence[int]]
"""Block lengths, and how many steps each lasts: [[1, 200], [4, 200]]."""


def block_length_at(step: int, stages: Stages, own: int) -> int:
    """The block length of a training step; after the last stage the model's own.

    Args:
        step: counted from 0, so a resumed run has the same.
        stages: what comes before the model's own block length.
        own: that of the model.
    """
    for length, num_steps in stages:
        if step < num_steps:
            return length
        step -= num_steps
    return own


def check_stages(stages: Any, own: int | None = None) -> None:
    """Make sure that blocks grow by whole blocks: a batch holds whole ones of the model's own.

    Args:
        stages: what should be pairs of numbers above 0.
        own: the model's block length, where it is known.

    Raises:
        InputError: they are something else, or a length does not divide the next one.
    """
    is_list = isinstance(stages, (list, tuple))
    if not is_list or not all(_is_stage(stage) for stage in stages):
        raise InputError(
            "`block_warmup` must be pairs of a block length and its number of steps, "
            f"got {show(stages)}",
            hint="as in [[1, 200], [4, 200], [8, 200], [16, 200]]",
        )
    lengths = [length for length, _ in stages] + ([own] if own else [])
    for length, longer in pairwise(lengths):
        if longer <= length or longer % length:
            raise InputError(
                "the blocks of `block_warmup` must grow up to the model's own, and each length "
                f"divide the next; got {longer} after {length}"
            )


def _is_stage(stage: Any) -> bool:
    is_pair = isinstance(stage, (list, tuple)) and len(stage) == 2
    return is_pair and all(type(number) is int and number > 0 for number in stage)
