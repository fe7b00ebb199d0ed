"""A feed-forward block of experts in kernels against the same block in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmax.cache import BlockCache, CacheWindow
from dmax.kernels import using
from dmax.kernels.norm import add_and_norm
from dmax.kernels.quant import Format, quantize
from dmax.models import LLaDA2MoeConfig
from dmax.models.llada2_moe.modeling import (
    LLaDA2MoeDecoderLayer,
    LLaDA2MoeRMSNorm,
    LLaDA2MoeSparseBlock,
)
from dmax.models.quantization import QuantizedExperts

LENGTH = 8
HIDDEN = 64
EXPERTS = 16


def block_of(device: torch.device, dtype: torch.dtype, **changes: Any) -> LLaDA2MoeSparseBlock:
    """A block of 16 experts in 4 groups, of which a token chooses 3."""
    config = LLaDA2MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=32, num_experts=EXPERTS, num_experts_per_tok=3,
        n_group=4, topk_group=2, **changes,
    )  # fmt: skip
    config._experts_implementation = "fused_moe"
    block = LLaDA2MoeSparseBlock(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    assert block.gate.expert_bias is not None
    block.gate.expert_bias.copy_(torch.randn(EXPERTS, generator=generator) / 4)
    return block.to(device, dtype).requires_grad_(False)


def tokens_of(num_rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(num_rows, LENGTH, HIDDEN, generator=generator)
    return tokens.to(device, dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = actual.double() - expected.double()
    return (difference.norm() / expected.double().norm()).item()


# Up to 32 tokens, one kernel chooses and lists.
@pytest.mark.parametrize(
    ("num_rows", "num_shared", "dtype"),
    [(1, 1, torch.float32), (5, 0, torch.float32), (4, 0, torch.bfloat16), (5, 1, torch.bfloat16)],
)
def test_kernels_equal_their_twin(
    triton_device: torch.device, num_rows: int, num_shared: int, dtype: torch.dtype
) -> None:
    block = block_of(triton_device, dtype, num_shared_experts=num_shared)
    tokens = tokens_of(num_rows, triton_device, dtype)
    with using("torch"):
        expected = block(tokens)
    with using("triton"):
        terms = block(tokens)
    assert terms.shape == (num_rows, LENGTH, 3 + num_shared, HIDDEN) and terms.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative_error(terms.sum(dim=2), expected) <= bound


@pytest.mark.parametrize("form", ["int8", "fp8", "int4"])
def test_kernels_take_quantised_experts_with_a_plain_shared_one(
    triton_device: torch.device, form: Format
) -> None:
    is_old = triton_device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9)
    if form == "fp8" and is_old:
        pytest.skip("this GPU has no e4m3")
    block = block_of(triton_device, torch.float32)
    experts = block.experts
    rounded = quantize(experts.gate_up_proj, form), quantize(experts.down_proj, form)
    block.experts = QuantizedExperts(*rounded, experts.act_fn)
    tokens = tokens_of(3, triton_device, torch.float32)
    with using("torch"):
        expected = block(tokens)
    with using("triton"):
        terms = block(tokens)
    assert terms.dim() == 4
    assert relative_error(terms.sum(dim=2), expected) <= 1e-5


@pytest.mark.parametrize("num_rows", [2, 5])
def test_idle_rows_go_to_no_expert(
    triton_device: torch.device, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dmax.kernels import moe_triton

    block = block_of(triton_device, torch.float32)
    tokens = tokens_of(num_rows, triton_device, torch.float32)
    idle = torch.tensor([False, True] * 3, device=triton_device)[:num_rows]
    found = []
    run = moe_triton.expert_terms

    def spy(tokens: Tensor, routing: Any, *rest: Any) -> Tensor:
        active = routing.experts[: routing.active.item()]
        found.append(routing.counts[active].cpu())
        terms: Tensor = run(tokens, routing, *rest)
        return terms

    monkeypatch.setattr(moe_triton, "expert_terms", spy)
    with using("triton"):
        with_idle = block(tokens, idle)
        alone = block(tokens[~idle])
    assert len(found[0]) == len(found[1]) and found[0].gt(0).all()
    assert int(found[0].sum()) == int((~idle).sum()) * LENGTH * 3
    torch.testing.assert_close(with_idle[~idle], alone, rtol=1e-5, atol=1e-5)
    assert with_idle[idle][:, :, :3].eq(0).all()  # only the shared expert sees them


def test_rows_of_the_spare_slot_are_idle() -> None:
    cache = BlockCache(1, 3, LENGTH, 1, 4)
    starts = torch.zeros(2, dtype=torch.long)

    def idle(*slots: int) -> list[bool] | None:
        where = torch.tensor(slots), starts[: len(slots)], starts[: len(slots)]
        window = CacheWindow(cache, *where, LENGTH, LENGTH, in_order=False, in_place=True)
        return None if window.idle is None else window.idle.tolist()

    assert idle(0, 2) is None
    cache.spare_slot = 2
    assert idle(0, 2) == [False, True]
    assert idle(2) is None  # nothing is filled up to one row


def test_a_layer_hands_its_terms_to_the_next_norm(triton_device: torch.device) -> None:
    x = tokens_of(2, triton_device, torch.float32)
    terms = torch.randn(2, LENGTH, 5, HIDDEN, device=triton_device)
    norm = LLaDA2MoeRMSNorm(HIDDEN, 1e-6).to(triton_device).requires_grad_(False)
    with using("torch"):
        expected = add_and_norm(x, terms, norm)
    with using("triton"):
        actual = add_and_norm(x, terms, norm)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected[0], x + terms.sum(dim=2))


def test_modules_that_were_replaced_run_by_themselves(triton_device: torch.device) -> None:
    """As with adapters, whose layers stand in the place of those of the shared expert."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block = block_of(triton_device, torch.float32)
    tokens = tokens_of(1, triton_device, torch.float32)
    assert block.shared_experts is not None
    plain: Any = block.shared_experts.down_proj
    doubled = Doubled(*plain.weight.shape[::-1], bias=False).to(triton_device)
    doubled.weight = plain.weight
    block.shared_experts.down_proj = doubled
    with using("torch"):
        expected = block(tokens)
    with using("triton"):
        actual = block(tokens)
    assert actual.dim() == 3
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_experts_that_are_to_run_otherwise_do(triton_device: torch.device) -> None:
    block = block_of(triton_device, torch.float32)
    block.experts.config._experts_implementation = "eager"
    with using("triton"):
        assert block(tokens_of(1, triton_device, torch.float32)).dim() == 3
    layer = LLaDA2MoeDecoderLayer(block.experts.config, 1)
    assert isinstance(layer.mlp, LLaDA2MoeSparseBlock)
