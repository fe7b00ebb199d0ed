"""Soft inputs: the paper's equations 8-10 checked directly, and where they are applied."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dmax.blend import SoftTokens, blend, embed_tokens

MASK = 19


def naive(tokens: list[Tensor], mask: Tensor, probs: list[float]) -> Tensor:
    """Equations 8-10, one position, in float64."""
    rest = 1 - sum(probs)
    mixed = rest * mask.double()
    length = rest * mask.norm().item()
    for prob, token in zip(probs, tokens, strict=True):
        mixed = mixed + prob * token.double()
        length += prob * token.double().norm().item()
    return mixed / mixed.norm() * length


def random_case(
    candidates: int, seed: int, positions: int = 6, size: int = 24
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(positions, candidates, size, generator=generator) * 3
    mask = torch.randn(size, generator=generator)
    probs = torch.rand(positions, candidates + 1, generator=generator).softmax(-1)[:, :candidates]
    return tokens, mask, probs


@settings(deadline=None, max_examples=50)
@given(candidates=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_blend_equals_the_equations(candidates: int, seed: int) -> None:
    tokens, mask, probs = random_case(candidates, seed)
    for position, row in enumerate(blend(tokens, mask, probs)):
        expected = naive(list(tokens[position]), mask, probs[position].tolist())
        torch.testing.assert_close(row.double(), expected, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=50)
@given(candidates=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_length_is_the_weighted_mean_and_direction_is_kept(candidates: int, seed: int) -> None:
    tokens, mask, probs = random_case(candidates, seed)
    soft = blend(tokens, mask, probs)
    plain = blend(tokens, mask, probs, renormalize=False)
    target = (probs * tokens.norm(dim=-1)).sum(-1) + (1 - probs.sum(-1)) * mask.norm()
    torch.testing.assert_close(soft.norm(dim=-1), target, rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.cosine_similarity(soft, plain, dim=-1), torch.ones(len(soft)))
    assert (plain.norm(dim=-1) <= target * (1 + 1e-5)).all()  # triangle inequality


def test_certainty_gives_the_token_and_doubt_gives_the_mask() -> None:
    tokens, mask, _ = random_case(1, 0)
    torch.testing.assert_close(blend(tokens, mask, torch.ones(6, 1)), tokens[:, 0])
    torch.testing.assert_close(blend(tokens, mask, torch.zeros(6, 1)), mask.expand(6, -1))


def test_without_renormalization_length_collapses() -> None:
    """Nearly orthogonal vectors of one length, mixed half and half, shrink to 1 / sqrt(2)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(200, 1, 2048, generator=generator)
    mask = torch.randn(2048, generator=generator)
    half = torch.full((200, 1), 0.5)
    soft = blend(tokens, mask, half)
    plain = blend(tokens, mask, half, renormalize=False)
    ratio = plain.norm(dim=-1) / soft.norm(dim=-1)
    assert ratio.mean() == pytest.approx(0.5**0.5, abs=0.01)


def test_candidates_of_no_probability_change_nothing() -> None:
    tokens, mask, probs = random_case(3, 1)
    probs[:, 1:] = 0
    torch.testing.assert_close(blend(tokens, mask, probs), blend(tokens[:, :1], mask, probs[:, :1]))


def test_opposite_vectors_stay_finite() -> None:
    """The mixture vanishes: there is no direction to rescale, but no division by zero either."""
    mask = torch.ones(8)
    assert blend(-mask[None, None], mask, torch.tensor([[0.5]])).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blend_keeps_the_dtype_and_computes_in_float32(dtype: torch.dtype) -> None:
    tokens, mask, probs = random_case(2, 2)
    tokens = tokens.to(dtype)
    mask = mask.to(dtype)
    soft = blend(tokens, mask, probs)
    assert soft.dtype == dtype
    assert torch.equal(soft, blend(tokens.float(), mask.float(), probs).to(dtype))


def test_gradient_reaches_tokens_and_mask() -> None:
    tokens, mask, probs = random_case(2, 3)
    tokens.requires_grad_()
    mask.requires_grad_()
    blend(tokens, mask, probs).square().sum().backward()
    assert tokens.grad is not None and tokens.grad.any()
    assert mask.grad is not None and mask.grad.any()


# ---- embed_tokens -------------------------------------------------------------------------------


@pytest.fixture
def embed() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(20, 12)


def test_a18_hard_tokens_are_rows_of_the_input_table(embed: nn.Embedding) -> None:
    tokens = torch.randint(20, (2, 5))
    assert torch.equal(embed_tokens(embed, tokens, None, MASK), embed(tokens))


@pytest.mark.parametrize("candidates", [1, 3])
def test_soft_inputs_are_fed_exactly_where_asked(embed: nn.Embedding, candidates: int) -> None:
    tokens = torch.randint(19, (2, 5))
    where = torch.rand(2, 5) < 0.5
    ids = torch.cat((tokens[..., None], torch.randint(19, (2, 5, candidates - 1))), dim=-1)
    probs = torch.rand(2, 5, candidates) / candidates
    inputs = embed_tokens(embed, tokens, SoftTokens(where, ids, probs), MASK)
    assert torch.equal(inputs[~where], embed(tokens)[~where])
    assert torch.equal(inputs[where], blend(embed(ids), embed.weight[MASK], probs)[where])
