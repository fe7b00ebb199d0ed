"""Soft inputs in one kernel, against equations 8-10 as `dmax.blend` computes them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.blend import SoftTokens, embed_tokens
from dmax.kernels import blend as kernels_blend
from dmax.kernels.blend import embed_soft

V, D, MASK = 20, 24, 19  # D fills no block


def case(candidates: int, dtype: torch.dtype, renormalize: bool = True) -> tuple[Tensor, Tensor, SoftTokens]:
    table = (torch.randn(V, D) * 3).to(dtype)
    tokens = torch.randint(MASK, (2, 5))
    ids = torch.cat((tokens[..., None], torch.randint(MASK, (2, 5, candidates - 1))), dim=-1)
    probs = torch.rand(2, 5, candidates) / candidates
    where = torch.arange(10).view(2, 5) % 3 > 0
    return table, tokens, SoftTokens(where, ids, probs, renormalize)


def plain(table: Tensor, tokens: Tensor, soft: SoftTokens | None) -> Tensor:
    return embed_tokens(partial(F.embedding, weight=table), tokens, soft, MASK)


def fused(table: Tensor, tokens: Tensor, soft: SoftTokens, device: torch.device) -> Tensor:
    from dmax.kernels import blend_triton

    there = SoftTokens(soft.where.to(device), soft.ids.to(device), soft.probs.to(device), soft.renormalize)
    return blend_triton.embed_soft(table.to(device), tokens.to(device), there, MASK).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_a_cpu_it_is_embed_tokens(dtype: torch.dtype) -> None:
    table, tokens, soft = case(2, dtype)
    assert torch.equal(embed_soft(table, tokens, soft, MASK), plain(table, tokens, soft))
    assert torch.equal(embed_soft(table, tokens, None, MASK), table[tokens])


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("candidates", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_equals_embed_tokens(
    triton_device: torch.device, dtype: torch.dtype, candidates: int, renormalize: bool
) -> None:
    table, tokens, soft = case(candidates, dtype, renormalize)
    result, expected = fused(table, tokens, soft, triton_device), plain(table, tokens, soft)
    assert result.dtype == dtype
    assert torch.equal(result[~soft.where], table[tokens][~soft.where])
    rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps  # one unit in the last place
    torch.testing.assert_close(result, expected, rtol=rounding, atol=1e-5)


def test_the_kernel_by_hand(triton_device: torch.device) -> None:
    """e(0) = (8, 0, ...), e_mask = (0, 6, ...): half and half is (4, 3), of length 5; the mean length is 7."""
    table = torch.zeros(V, D)
    table[0, 0], table[MASK, 1] = 8, 6
    tokens, half = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[[0.5], [1.0], [0.0]]])
    soft = SoftTokens(torch.ones(1, 3, dtype=torch.bool), tokens[..., None], half)
    result = fused(table, tokens, soft, triton_device)
    torch.testing.assert_close(result[0, :, :2], torch.tensor([[5.6, 4.2], [8.0, 0.0], [0.0, 6.0]]))
    assert not result[0, :, 2:].any()


def test_descriptors_may_be_views(triton_device: torch.device) -> None:
    table, tokens, soft = case(3, torch.float32)
    views = SoftTokens(soft.where[:1].expand(2, -1), soft.ids.flip(1)[..., :2], soft.probs.mT.contiguous().mT[..., :2])
    result = fused(table.T.contiguous().T, tokens, views, triton_device)
    torch.testing.assert_close(result, plain(table, tokens, views))


def test_opposite_vectors_stay_finite(triton_device: torch.device) -> None:
    """The mixture vanishes: there is no direction to rescale, but no division by zero either."""
    table = torch.ones(V, D)
    table[0] = -1
    tokens = torch.zeros(1, 1, dtype=torch.long)
    soft = SoftTokens(torch.ones(1, 1, dtype=torch.bool), tokens[..., None], torch.tensor([[[0.5]]]))
    assert fused(table, tokens, soft, triton_device).isfinite().all()


@pytest.mark.usefixtures("triton_device")
def test_the_kernel_runs_where_triton_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from dmax.kernels import blend_triton

    sentinel = torch.zeros(1)
    monkeypatch.setattr(kernels_blend, "choose", lambda device: ("triton", "asked for"))
    monkeypatch.setattr(blend_triton, "embed_soft", lambda *_: sentinel)
    table, tokens, soft = case(1, torch.float32)
    assert embed_soft(table, tokens, soft, MASK) is sentinel
    assert embed_soft(table, tokens, None, MASK) is not sentinel
    assert embed_soft(table.double(), tokens, soft, MASK) is not sentinel
