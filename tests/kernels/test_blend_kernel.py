"""Soft inputs in one kernel, against equations 8-10 as `dmax.blend` computes them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmax import blend
from dmax.blend import SoftTokens, embed_tokens

# D fills no block
V = 20
D = 24
MASK = 19


def case(
    candidates: int, dtype: torch.dtype, renormalize: bool = True
) -> tuple[Tensor, Tensor, SoftTokens]:
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

    on_device = (each.to(device) for each in (soft.where, soft.ids, soft.probs))
    soft = SoftTokens(*on_device, renormalize=soft.renormalize)
    return blend_triton.embed_soft(table.to(device), tokens.to(device), soft, MASK).cpu()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("candidates", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_equals_embed_tokens(
    triton_device: torch.device, dtype: torch.dtype, candidates: int, renormalize: bool
) -> None:
    table, tokens, soft = case(candidates, dtype, renormalize)
    result = fused(table, tokens, soft, triton_device)
    expected = plain(table, tokens, soft)
    assert result.dtype == dtype
    assert torch.equal(result[~soft.where], table[tokens][~soft.where])
    # One unit in the last place, of 16 bits.
    rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(result, expected, rtol=rounding, atol=1e-5)


def test_the_kernel_by_hand(triton_device: torch.device) -> None:
    """With e(0) = (8, 0, ...) and e_mask = (0, 6, ...), half and half is (4, 3).

    Its length is 5, and the mean length is 7.
    """
    table = torch.zeros(V, D)
    table[0, 0] = 8
    table[MASK, 1] = 6
    tokens = torch.zeros(1, 3, dtype=torch.long)
    half = torch.tensor([[[0.5], [1.0], [0.0]]])
    soft = SoftTokens(torch.ones(1, 3, dtype=torch.bool), tokens[..., None], half)
    result = fused(table, tokens, soft, triton_device)
    torch.testing.assert_close(result[0, :, :2], torch.tensor([[5.6, 4.2], [8.0, 0.0], [0.0, 6.0]]))
    assert not result[0, :, 2:].any()


@pytest.mark.parametrize("rows", [[1], [2, 0, 2]])
def test_rows_are_read_where_they_are(triton_device: torch.device, rows: list[int]) -> None:
    """As open blocks are: active positions are blended, unless they are masked."""
    from dmax.kernels import blend_triton

    table = torch.randn(V, D)
    tokens = torch.randint(MASK, (4, 5))
    ids = torch.randint(MASK, (4, 5, 2))
    probs = torch.rand(4, 5, 2) / 2
    active = torch.rand(4, 5) < 0.8
    masked = torch.rand(4, 5) < 0.3
    every = SoftTokens(active, ids, probs, masked=masked)
    wanted = torch.tensor(rows)
    where = (active & ~masked)[wanted]
    expected = plain(table, tokens[wanted], SoftTokens(where, ids[wanted], probs[wanted]))
    embed = partial(F.embedding, weight=table)
    assert torch.equal(embed_tokens(embed, tokens, every, MASK, wanted), expected)

    on_device = [each.to(triton_device) for each in (table, tokens, wanted)]
    there = [each.to(triton_device) for each in (active, ids, probs, masked)]
    soft = SoftTokens(*there[:3], masked=there[3])
    result = blend_triton.embed_soft(*on_device[:2], soft, MASK, on_device[2]).cpu()
    torch.testing.assert_close(result, expected)


def test_descriptors_may_be_views(triton_device: torch.device) -> None:
    table, tokens, soft = case(3, torch.float32)
    views = SoftTokens(
        soft.where[:1].expand(2, -1),
        soft.ids.flip(1)[..., :2],
        soft.probs.mT.contiguous().mT[..., :2],
    )
    result = fused(table.T.contiguous().T, tokens, views, triton_device)
    torch.testing.assert_close(result, plain(table, tokens, views))


def test_opposite_vectors_stay_finite(triton_device: torch.device) -> None:
    """The mixture vanishes: there is no direction to rescale, but no division by zero either."""
    table = torch.ones(V, D)
    table[0] = -1
    tokens = torch.zeros(1, 1, dtype=torch.long)
    soft = SoftTokens(
        torch.ones(1, 1, dtype=torch.bool), tokens[..., None], torch.tensor([[[0.5]]])
    )
    assert fused(table, tokens, soft, triton_device).isfinite().all()


class Scaled(nn.Embedding):
    """As in models that multiply their embeddings by a constant."""

    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids)


@pytest.mark.usefixtures("kernels")
def test_the_kernel_runs_for_plain_tables_where_triton_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dmax.kernels import blend_triton

    sentinel = torch.zeros(1)
    monkeypatch.setattr(blend_triton, "embed_soft", lambda *_: sentinel)
    _, tokens, soft = case(1, torch.float32)

    def fuses(embed: blend.Embed, soft: SoftTokens | None = soft) -> bool:
        return embed_tokens(embed, tokens, soft, MASK) is sentinel

    embed = nn.Embedding(V, D)
    assert not fuses(embed)  # a gradient is wanted, and the kernel has none
    with torch.no_grad():
        assert fuses(embed)
        assert not fuses(embed, None)
        assert not fuses(nn.Embedding(V, D, dtype=torch.float64))
        assert not fuses(nn.Embedding(V, D, max_norm=1.0))
        assert not fuses(Scaled(V, D))
        assert not fuses(lambda ids: embed(ids))
        hook = embed.register_forward_hook(lambda *_: None)
        assert not fuses(embed)
        hook.remove()
        embed.forward = partial(nn.Embedding.forward, embed)  # type: ignore[method-assign]
        assert not fuses(embed)


def test_a_plain_table_gives_what_any_embedding_gives() -> None:
    _, tokens, soft = case(2, torch.float32)
    for embed in (nn.Embedding(V, D), Scaled(V, D)):
        with_gradient = embed_tokens(embed, tokens, soft, MASK)
        with torch.no_grad():
            assert torch.equal(embed_tokens(embed, tokens, soft, MASK), with_gradient)
