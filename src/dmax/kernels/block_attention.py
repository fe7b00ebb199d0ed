"""Attention of blocks over a `BlockCache`, from projected heads to mixed values, without copies of the cache.

The twin is what `LLaDA2MoeAttention` does by itself: norms, rotation, `CacheWindow.update`,
attention under a mask. The Triton path (`block_attention_triton.py`) reads each row's own positions
in place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dmax.kernels import FUSED_DTYPES, implementation, triton_kernels, wants_gradient


def can_attend(heads: Tensor, norms: tuple[Tensor, Tensor], cache: Any) -> bool:
    """Whether `block_attention` takes these arguments: shapes, dtypes and devices alone decide.

    Gradients, weights that are elsewhere (offloaded), and forwards that are not over whole blocks
    (`CacheWindow.bases`) are left to the twin.
    """
    if implementation(heads.device) != "triton" or getattr(cache, "bases", None) is None:
        return False
    return (
        heads.dtype in FUSED_DTYPES
        and heads.dtype == cache.cache.keys[0].dtype
        and all(weight.device == heads.device for weight in norms)
        and not wants_gradient(heads)
    )


def block_attention(
    heads: Tensor,
    norms: tuple[Tensor, Tensor],
    eps: float,
    rotary: tuple[Tensor, Tensor],
    window: Any,
    layer: int,
    scaling: float,
) -> Tensor:
    """Norm and rotate queries and keys, write keys and values into the cache, attend to what each row may see.

    Args:
        heads: [R, L, H + 2 G, d], queries, keys and values of R rows, see `can_attend`.
        norms: weights [d] of the queries' and the keys' norm.
        eps: of the norms.
        rotary: cosine, and sine with its sign, each [R, L, 1, rotary dimensions].
        window: `dmax.cache.CacheWindow` with `bases`: a row sees the positions before its base, and
            itself.
        layer: whose keys and values.
        scaling: what scores are multiplied with.

    Returns:
        [R, L, H d], the heads' outputs, computed in float32 throughout: the twin rounds after each
        of its steps.
    """
    kernels = triton_kernels("block_attention")
    return kernels.block_attention(heads, norms, eps, rotary, window, layer, scaling)
