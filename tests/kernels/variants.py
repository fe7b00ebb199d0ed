"""Prints how many variants of each kernel of attention one growing request asks the compiler for.

    python variants.py FIRST LAST

Blocks from FIRST to LAST positions are open, each first with the block before it on its way into
the cache, then alone. Launches end before the compiler: a driver that names a GPU stands in for the
real one.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.runtime.driver import driver

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from compile_kernels import BF16, HEAD_SIZE, KEY_VALUE_HEADS, AbsentGPU

from dmax.cache import BlockCache, CacheWindow
from dmax.kernels.block_attention import block_attention

LENGTH = 32
HEADS = 16
EVERY = 8  # blocks


def attend(cache: BlockCache, starts: list[int]) -> None:
    """Attention of rows of one sequence, as a layer of LLaDA-2.0-mini calls it."""
    num_rows = len(starts)
    # As in `Batch.where`: one tensor, so that the rows decide how its parts are aligned.
    slots, start, base = torch.tensor(([0] * num_rows, starts, starts))
    span = max(starts) + LENGTH
    window = CacheWindow(cache, slots, start, base, LENGTH, span, in_order=False, in_place=True)
    heads = torch.zeros(num_rows, LENGTH, HEADS + 2 * KEY_VALUE_HEADS, HEAD_SIZE, dtype=BF16)
    norm = torch.ones(HEAD_SIZE, dtype=BF16)
    turn = torch.ones(1, cache.capacity, 1, HEAD_SIZE // 2, dtype=BF16)
    block_attention(heads, (norm, norm), 1e-6, (turn, turn), window, 0, HEAD_SIZE**-0.5)


def main(first: int, last: int) -> None:
    variants = set[tuple[str, str]]()

    def record(*, key: str, fn: Any, **_: Any) -> bool:
        variants.add((fn.name.rpartition(".")[2], key))
        return True  # which ends the launch

    knobs.runtime.jit_cache_hook = record
    driver.set_active(AbsentGPU(90))
    cache = BlockCache(1, 1, last + LENGTH, KEY_VALUE_HEADS, HEAD_SIZE, dtype=BF16)
    for start in range(first, last + 1, EVERY * LENGTH):
        attend(cache, [start - LENGTH, start])
        attend(cache, [start])
    json.dump(Counter(name for name, _ in variants), sys.stdout)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
