"""Attention of blocks over a `BlockCache`, from projected heads to mixed values, without copies.

The twin is what `LLaDA2MoeAttention` does by itself: norms, rotation, `CacheWindow.update`, and
attention under a mask. The Triton path (`block_attention_triton.py`) reads each row's own positions
where they lie in the cache.
"""

from __future__ import annotations

from torch import Tensor

from dmax.cache import CacheWindow


def block_attention(
    heads: Tensor,
    norms: tuple[Tensor, Tensor],
    eps: float,
    rotary: tuple[Tensor, Tensor],
    window: CacheWindow,
    layer: int,
    scaling: float,
) -> Tensor:
    """Norm and rotate queries and keys, write keys and values into the cache, and attend.

    Args:
        heads: [R, L, H + 2 G, d], queries, keys and values of R rows.
        norms: weights [d] of the norms of queries and keys.
        eps: of the norms.
        rotary: cosine, and sine with its sign, of all positions T: each [1, T, 1, rotary
            dimensions], contiguous.
        window: one that is in place.
        layer: the layer whose keys and values are used.
        scaling: what scores are multiplied with.

    Returns:
        [R, L, H d], the heads' outputs. They are computed in float32 throughout, where the twin
        rounds after each of its steps.
    """
    from dmax.kernels import block_attention_triton

    return block_attention_triton.block_attention(
        heads, norms, eps, rotary, window.cache.keys[layer], window.cache.values[layer],
        window.slots, window.starts, window.bases, scaling,
    )  # fmt: skip
