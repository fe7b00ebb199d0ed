"""Soft inputs straight from the embedding table: gather, mix and restore the length in one kernel.

The plain path (`dmax.blend.embed_tokens`) stores the k gathered rows of every position, in float32 too; the Triton
path (`blend_triton.py`) reads k + 1 rows and writes one.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.blend import SoftTokens, embed_tokens
from dmax.kernels import choose


@torch.no_grad()
def embed_soft(table: Tensor, tokens: Tensor, soft: SoftTokens | None, mask_token_id: int) -> Tensor:
    """Input embeddings [B, L, D] in the dtype of `table` [V, D]: hard for `tokens` [B, L], blended where `soft` says.

    Equals `dmax.blend.embed_tokens` (paper eqs. 8-10) with a lookup in `table` as the embedding, up to the order of
    float32 sums. Shapes are static and nothing waits for the device. No gradient.
    """
    if soft is not None and choose(table.device)[0] == "triton" and table.dtype != torch.float64:
        from dmax.kernels import blend_triton  # imports triton

        return blend_triton.embed_soft(table, tokens, soft, mask_token_id)
    return embed_tokens(partial(F.embedding, weight=table), tokens, soft, mask_token_id)
